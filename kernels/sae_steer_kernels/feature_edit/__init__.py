"""``feature_edit``: encode, edit and write back the features that a request names, for a whole step in one op.

For a token ``t`` with slot ``s = slots[t]`` (0 = nothing: the row is not touched, to the bit):

    x      = read[t] (or y[t]) + residual[t]                                       float32
    f_i    = act_i(<enc[s, i], N_i(x)> + b_i)                                       every row i < slot_int[s, ROWS]
    f'_i   = clip(a_i f_i + c_i, lo_i, hi_i) * G_i(f_i)^gamma_i                     0 inside the masked range
    y[t]  += sum_i (f'_i - f_i) s_i dec[s, i]                                       rows whose selector and gate hold

The meaning is that of the design document, section 2. :mod:`.reference` is its literal float64 form,
:mod:`.layout` names the packed scalars.
"""

import functools
import importlib.util
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from sae_steer_kernels._call import call
from sae_steer_kernels._op import Op, lazily, torch_op, triton_obstacle
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.layout import Act, Norm, RowFloat, RowInt, Skip, SlotFloat, SlotInt
from sae_steer_kernels.feature_edit.reference import feature_edit_reference
from sae_steer_kernels.feature_edit.regimes import scratch_floats as scratch_floats
from sae_steer_kernels.feature_edit.torch_impl import edit_by_torch

_SCALE_DEFAULTS = {
    RowFloat.MAG_SCALE: 1.0,
    RowFloat.SCALE: 1.0,
    RowFloat.LO: -math.inf,
    RowFloat.HI: math.inf,
    RowFloat.MASK_LO: math.inf,
    RowFloat.MASK_HI: -math.inf,
    RowFloat.GAMMA: 1.0,
    RowFloat.WHEN_ABOVE: -math.inf,
    RowFloat.WHEN_BELOW: math.inf,
}


def empty_rows(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scalars of rows that do nothing: ``[*shape, len(RowFloat)]`` float32 and ``[*shape, len(RowInt)]`` int32."""
    floats = torch.zeros(*shape, len(RowFloat), device=device)
    for column, value in _SCALE_DEFAULTS.items():
        floats[..., column] = value
    ints = torch.zeros(*shape, len(RowInt), dtype=torch.int32, device=device)
    ints[..., RowInt.ACT] = Act.IDENTITY
    ints[..., RowInt.WHEN_ROW] = -1
    return floats, ints


def skips_of(row_float: Tensor, row_int: Tensor, slot_float: Tensor) -> Skip:
    """What a slot does not ask for.

    Args:
        row_float: ``[K, len(RowFloat)]``, of the rows in use.
        row_int: ``[K, len(RowInt)]``.
        slot_float: ``[len(SlotFloat)]``.
    """
    act = row_int[:, RowInt.ACT]
    unbounded = (row_float[:, RowFloat.LO] == -math.inf) & (row_float[:, RowFloat.HI] == math.inf)
    widths = row_float[:, [RowFloat.GAIN_WIDTH_POS, RowFloat.GAIN_WIDTH_NEG]]
    plain = (act == Act.IDENTITY) | (act == Act.RELU) | (act == Act.JUMPRELU)
    unasked = {
        Skip.NORM: (row_int[:, RowInt.NORM] == Norm.NONE).all(),
        Skip.ACTIVATION: plain.all(),
        Skip.GAIN: (widths == 0).all(),
        Skip.MASK: (row_float[:, RowFloat.MASK_LO] > row_float[:, RowFloat.MASK_HI]).all(),
        Skip.BOUNDS: unbounded.all(),
        Skip.UNITS: (row_int[:, RowInt.NORM_UNITS] == 0).all(),
        Skip.GATE: (row_int[:, RowInt.WHEN_ROW] < 0).all(),
        Skip.LIMIT: slot_float[SlotFloat.DOSE_LIMIT] == math.inf,
    }
    return functools.reduce(operator.or_, (skip for skip, holds in unasked.items() if bool(holds)), Skip(0))


@dataclass(frozen=True, slots=True)
class EditTable:
    """Static tables of one site and one bucket; slot 0 means nothing and is never written.

    Args:
        enc: ``[S, K, D]`` float32 encoder rows (bfloat16 rows would flip gates near their thresholds).
        dec: ``[S, K, D_out]`` decoder rows in the model's dtype.
        row_float: ``[S, K, len(RowFloat)]`` float32.
        row_int: ``[S, K, len(RowInt)]`` int32.
        slot_float: ``[S, len(SlotFloat)]`` float32.
        slot_int: ``[S, len(SlotInt)]`` int32.
        gain: ``[S, K, 2, B]`` float32 gain tables, for f > 0 and for f < 0.
    """

    enc: Tensor
    dec: Tensor
    row_float: Tensor
    row_int: Tensor
    slot_float: Tensor
    slot_int: Tensor
    gain: Tensor

    @classmethod
    def empty(
        cls,
        *,
        slots: int,
        rows: int,
        width: int,
        width_out: int,
        dtype: torch.dtype,
        device: torch.device,
        gain_bins: int = 1,
    ) -> Self:
        """Tables for ``slots`` programs (slot 0 comes on top) of ``rows`` features each."""
        shape = (slots + 1, rows)
        floats, ints = empty_rows(shape, device)
        limits = torch.full((slots + 1, len(SlotFloat)), math.inf, device=device)
        return cls(
            enc=torch.zeros(*shape, width, device=device),
            dec=torch.zeros(*shape, width_out, dtype=dtype, device=device),
            row_float=floats,
            row_int=ints,
            slot_float=limits,
            slot_int=torch.zeros(slots + 1, len(SlotInt), dtype=torch.int32, device=device),
            gain=torch.ones(*shape, 2, gain_bins, device=device),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tables, in the order in which the op takes them."""
        return self.enc, self.dec, self.row_float, self.row_int, self.slot_float, self.slot_int, self.gain

    def to(self, device: torch.device) -> Self:
        """The same tables on another device."""
        return type(self)(*(t.to(device) for t in self.tensors))

    @property
    def nbytes(self) -> int:
        """Bytes that the tables hold."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, slots=True)
class EditBuffers:
    """What the op reports, per token. Rows of untouched tokens hold nothing but ``flags = 0`` and ``dose = 0``.

    Args:
        before: ``[T, K]`` float32 activations ``f``.
        after: ``[T, K]`` float32 activations ``f'`` (``f`` where an edit did not hold).
        dose: ``[T]`` float32, ``|delta| / |x|`` as asked for, before the limit.
        flags: ``[T]`` int32, a :class:`~sae_steer_kernels.feature_edit.layout.Flag` each.
        scratch: ``[n]`` float32 partial results between the launches of one call; None = no call has more than one.
    """

    before: Tensor
    after: Tensor
    dose: Tensor
    flags: Tensor
    scratch: Tensor | None = None

    @classmethod
    def empty(cls, *, tokens: int, rows: int, device: torch.device, scratch: int = 0) -> Self:
        """Buffers for steps of up to ``tokens`` tokens; ``scratch`` is that of :func:`scratch_floats`."""
        return cls(
            before=torch.zeros(tokens, rows, device=device),
            after=torch.zeros(tokens, rows, device=device),
            dose=torch.zeros(tokens, device=device),
            flags=torch.zeros(tokens, dtype=torch.int32, device=device),
            scratch=torch.zeros(scratch, device=device) if scratch else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        mine = (self.before, self.after, self.dose, self.flags, self.scratch)
        return sum(t.nbytes for t in mine if t is not None)

    def first(self, tokens: int) -> Self:
        """A view of the first ``tokens`` rows, with all of the scratch."""
        return self.at(slice(tokens))

    def split(self, parts: int) -> Self:
        """A view as ``[parts, T / parts, ...]``, with all of the scratch."""
        mine = (self.before, self.after, self.dose, self.flags)
        before, after, dose, flags = (t.view(parts, -1, *t.shape[1:]) for t in mine)
        return type(self)(before, after, dose, flags, self.scratch)

    def at(self, index: int | slice | Tensor) -> Self:
        """What is at an index of the first dimension, a view where torch gives one, with all of the scratch."""
        chosen = (self.before[index], self.after[index], self.dose[index], self.flags[index])
        return type(self)(*chosen, self.scratch)


def _feature_edit(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    active: Tensor,
    enc: Tensor,
    dec: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    slot_float: Tensor,
    slot_int: Tensor,
    gain: Tensor,
    before: Tensor,
    after: Tensor,
    dose: Tensor,
    flags: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    rank: Tensor | None = None,
    scratch: Tensor | None = None,
    order: Tensor | None = None,
    tiles: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    arguments = (
        y, slots, bits, enc, dec, row_float, row_int, slot_float, slot_int, gain, before, after, dose, flags,
        read, residual, base, rank, scratch, order, tiles, batch_invariant,
    )  # fmt: skip
    if not call(FEATURE_EDIT, y.device, active, arguments):
        flags.zero_()
        dose.zero_()


_OP = torch_op(_feature_edit, name="feature_edit", mutates=("y", "before", "after", "dose", "flags", "scratch"))


def feature_edit(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    active: Tensor,
    table: EditTable,
    buffers: EditBuffers,
    *,
    read: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    rank: Tensor | None = None,
    groups: TokenGroups | None = None,
    batch_invariant: bool = False,
) -> None:
    """Edits ``y`` in place and fills ``buffers``; rows whose slot is 0 stay as they are, to the bit.

    Args:
        y: ``[T, D_out]`` tensor that is written.
        slots: ``[T]`` int32 slot of each token; 0 = none.
        bits: ``[T]`` int32 selectors that hold on each token.
        active: ``[]`` bool on the CPU: whether any token of the step has a slot. False returns at once.
        table: The site's static tables.
        buffers: What is reported, ``T`` rows.
        read: ``[T, D]`` tensor that is encoded, where it is not ``y``.
        residual: ``[T, D]`` added to what is encoded (hosts that keep the residual stream in two parts).
        base: ``[T, D_out]`` ``decode(f) - y`` for tokens that drop the reconstruction error.
        rank: ``[T, K]`` int32 number of pre-activations above each row's own, where rows are TopK.
        groups: This step's tokens grouped by slot; without it no prefill goes to tensor cores.
        batch_invariant: A token's bits do not depend on its neighbours, nor on how many there are. Slower.

    Raises:
        LookupError: ``SAE_STEER_FEATURE_EDIT`` names no implementation, or one that cannot take the call.
        RuntimeError: A CUDA graph is captured, and the implementation cannot be in one.
    """
    order, tiles = (None, None) if groups is None else (groups.order, groups.tiles)
    # Without a graph to hold it, the op's own dispatch would cost as much as a small edit.
    run: Callable[..., None] = _OP if torch.compiler.is_compiling() else _feature_edit
    run(
        y, slots, bits, active, *table.tensors, buffers.before, buffers.after, buffers.dose, buffers.flags,
        read, residual, base, rank, buffers.scratch, order, tiles, batch_invariant,
    )  # fmt: skip


class SmallEdits(Protocol):
    """:func:`feature_edit` by one table for steps of few tokens, with what stays looked up before."""

    def takes(self, y: Tensor) -> bool:
        """Whether a step's edits can be done so."""
        ...

    def __call__(
        self, y: Tensor, read: Tensor | None, residual: Tensor | None, base: Tensor | None, rank: Tensor | None
    ) -> None:
        """Edits ``y [T, D_out]`` in place; the others as in :func:`feature_edit`, of T rows at least."""
        ...


def small_edits(table: EditTable, slots: Tensor, bits: Tensor, buffers: EditBuffers) -> SmallEdits | None:
    """Looks up what a table's small edits need, for as long as these tensors stay where they are.

    Args:
        table: The site's static tables.
        slots: ``[>= T]`` int32, as in :func:`feature_edit`.
        bits: ``[>= T]`` int32.
        buffers: What is reported, T rows at least.

    Returns:
        None where the device's implementation has no such way, or not for the table's dtype.
    """
    if FEATURE_EDIT.provider(slots.device) != "numba" or table.dec.dtype not in (torch.float32, torch.bfloat16):
        return None
    enc, dec, *scalars = table.tensors
    edits: SmallEdits = lazily(_NUMBA, "FewEdits")(
        slots, bits, enc, dec, scalars, (buffers.before, buffers.after, buffers.dose, buffers.flags)
    )
    return edits


_NUMBA = "sae_steer_kernels.feature_edit.numba_impl"
_TRITON = "sae_steer_kernels.feature_edit.triton_impl"


def _generate(seed: int, device: torch.device, **sizes: Any) -> dict[str, Any]:
    call: dict[str, Any] = lazily("sae_steer_kernels.feature_edit.generate", "generate")(seed, device, **sizes)
    return call


def _triton_supports(*arguments: Any) -> str:
    return triton_obstacle() or str(lazily(_TRITON, "supports")(*arguments))


FEATURE_EDIT = Op(
    name="feature_edit",
    reference=feature_edit_reference,
    implementations={
        "torch": edit_by_torch,
        "numba": lazily(_NUMBA, "feature_edit_numba"),
        "triton": lazily(_TRITON, "feature_edit_triton"),
    },
    # Numba comes with vLLM; without it a CPU's small steps cost a few times as much.
    by_device={"cpu": "numba" if importlib.util.find_spec("numba") else "torch", "cuda": "triton"},
    # Relative error of one edited row against float64, per dtype of ``y``. The encode, the edit and the sum run in
    # float32 (24 bits: 1e-7 an operation, some hundred of them); storing to a narrow ``y`` and keeping decoder rows in
    # its dtype rounds once each, to 2^-8 in bfloat16 and 2^-11 in float16.
    tolerances={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 2e-5},
    supports={"triton": _triton_supports},
    generate=_generate,
    host_free=frozenset({"triton"}),
)
