"""``feature_edit`` in Triton: which kernels a call takes, and how they are launched.

Nothing here depends on what the tensors hold: the number of launches and their grids follow from the padded number of
tokens and from the shapes of the tables, so that a CUDA graph of a call is right for every later step.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from sae_steer_kernels._op import triton_obstacle
from sae_steer_kernels.feature_edit.grouping import TILE, tile_count
from sae_steer_kernels.feature_edit.regimes import (
    FEW,
    SPLITS,
    WIDEST,
    Regime,
    choose,
    grouped_floats,
    row_shape,
    tile_shape,
    two_phase_floats,
)
from sae_steer_kernels.feature_edit.triton_rows import edit_row, edit_split, finish_row
from sae_steer_kernels.feature_edit.triton_tiles import (
    coefficient_tiles,
    encode_tiles,
    fit_tiles,
    measure_tiles,
    write_tiles,
)

# Products of float32 on tensor cores. What is encoded has at most 11 bits of a mantissa in the narrow types (more only
# where a residual is added), so three bfloat16 products leave an error of 2^-17 of an encoder row's element.
_PRECISION = {torch.bfloat16: "bf16x3", torch.float16: "bf16x3", torch.float32: "bf16x6"}


def supports(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
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
    *_: object,
) -> str:
    """Why the kernels cannot take a call, whose arguments are those of the implementation; "" = they can."""
    if obstacle := triton_obstacle():
        return obstacle
    if max(enc.shape[2], dec.shape[2]) > WIDEST:
        return f"rows of more than {WIDEST} columns do not fit a program's registers"
    if y.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{y.dtype} is not one of float32, bfloat16, float16"
    columns = {"y": y, "read": read, "residual": residual, "base": base, "rank": rank, "before": before, "after": after}
    for name, t in columns.items():
        if t is not None and t.stride(-1) != 1:
            return f"the columns of {name} are not contiguous"
    if before.stride(0) != after.stride(0):
        return "before and after are not laid out alike"
    if not all(t.is_contiguous() for t in (enc, dec, row_float, row_int, slot_float, slot_int, gain)):
        return "a table is not contiguous"
    return ""


def feature_edit_triton(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
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
    read: Tensor | None,
    residual: Tensor | None,
    base: Tensor | None,
    rank: Tensor | None,
    scratch: Tensor | None = None,
    order: Tensor | None = None,
    tiles: Tensor | None = None,
    batch_invariant: bool = False,
    regime: Regime | None = None,
) -> None:
    """Edits ``y`` in place; arguments as in :func:`sae_steer_kernels.feature_edit.feature_edit`.

    Args:
        scratch: Float32 memory, as much as ``regimes.scratch_floats`` says; without it every call is one of rows.
        regime: The regime to take, for tests and benchmarks; None = :func:`choose`.

    Raises:
        ValueError: There is less scratch, or there are smaller groups, than the regime needs.
    """
    tokens, rows = y.shape[0], enc.shape[1]
    if tokens == 0:
        return
    if regime is None:
        regime = choose(
            tokens, rows,
            scratch=scratch is not None, grouped=order is not None and tiles is not None,
            batch_invariant=batch_invariant,
        )  # fmt: skip
    call = _Call(
        y, slots, bits, enc, dec, row_float, row_int, slot_float, slot_int, gain, before, after, dose, flags,
        read, residual, base, rank,
    )  # fmt: skip
    if regime is Regime.ROW:
        _launch_rows(call)
        return
    assert scratch is not None  # `choose` takes the other two only with scratch
    needed = (
        two_phase_floats(tokens, dec.shape[2])
        if regime is Regime.TWO_PHASE
        else grouped_floats(tokens, rows, enc.shape[2], dec.shape[2])
    )
    if scratch.numel() < needed:
        raise ValueError(f"A step of {tokens} tokens needs {needed} floats of scratch, and has {scratch.numel()}.")
    if regime is Regime.TWO_PHASE:
        _launch_two_phase(call, scratch)
        return
    assert order is not None  # and the last only with grouped tokens
    assert tiles is not None
    _launch_grouped(call, scratch, order, tiles)


class _Call(NamedTuple):
    """The tensors of a call."""

    y: Tensor
    slots: Tensor
    bits: Tensor
    enc: Tensor
    dec: Tensor
    row_float: Tensor
    row_int: Tensor
    slot_float: Tensor
    slot_int: Tensor
    gain: Tensor
    before: Tensor
    after: Tensor
    dose: Tensor
    flags: Tensor
    read: Tensor | None
    residual: Tensor | None
    base: Tensor | None
    rank: Tensor | None

    @property
    def tokens(self) -> int:
        return self.y.shape[0]


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **numbers: Any) -> None:
    # Fusion is asked for aloud, because Triton's default is about to change and numbers would move with its version.
    kernel[grid](*arguments, **numbers, enable_fp_fusion=True)


def _launch_rows(c: _Call) -> None:
    shape = row_shape(c.enc.shape[1], c.enc.shape[2], c.dec.shape[2])
    _launch(
        edit_row, (c.tokens,),
        *c, c.y.stride(0), _stride(c.read), _stride(c.residual), _stride(c.base), _stride(c.rank), c.before.stride(0),
        K=c.enc.shape[1], D_OUT=c.dec.shape[2], B=c.gain.shape[3], **shape,
    )  # fmt: skip


def _launch_two_phase(c: _Call, scratch: Tensor) -> None:
    shape = row_shape(c.enc.shape[1], c.enc.shape[2], c.dec.shape[2])
    _launch(
        edit_split, (c.tokens, SPLITS),
        c.y, c.slots, c.bits, c.enc, c.dec, c.row_float, c.row_int, c.slot_int, c.gain, c.before, c.after, scratch,
        c.read, c.residual, c.rank,
        c.y.stride(0), _stride(c.read), _stride(c.residual), _stride(c.rank), c.before.stride(0),
        K=c.enc.shape[1], D_OUT=c.dec.shape[2], B=c.gain.shape[3], SPLITS=SPLITS, **shape,
    )  # fmt: skip
    _launch(
        finish_row, (c.tokens,),
        c.y, c.slots, c.bits, c.slot_float, c.slot_int, c.dose, c.flags, scratch, c.base,
        c.y.stride(0), _stride(c.base),
        D_OUT=c.dec.shape[2], BD_OUT=shape["BD_OUT"], BK=shape["BK"], SPLITS=SPLITS, num_warps=shape["num_warps"],
    )  # fmt: skip


def _launch_grouped(c: _Call, scratch: Tensor, order: Tensor, tiles: Tensor) -> None:
    rows, width, width_out = c.enc.shape[1], c.enc.shape[2], c.dec.shape[2]
    shape = tile_shape(rows, width, width_out)
    parts, blocks = shape["PARTS"], shape["BLOCKS"]
    sizes = [c.tokens * n for n in (parts * rows, parts * 2, rows, 1, blocks * 3)]
    partial, moments, changes, lengths, measures = torch.split(scratch[: sum(sizes)], sizes)
    number = tile_count(c.tokens, c.enc.shape[0])
    if order.shape[0] < c.tokens or tiles.shape[0] < number:
        raise ValueError(f"The groups are of fewer tokens than the step's {c.tokens}, or of fewer slots.")
    # The interpreter multiplies in full precision whatever it is asked for, and knows fewer names.
    precision = "ieee" if knobs.runtime.interpret else _PRECISION[c.y.dtype]
    _launch(
        encode_tiles, (number, parts, -(-rows // shape["BK"])),
        c.y, order, tiles, c.enc, c.slot_int, partial, moments, c.read, c.residual,
        c.tokens, c.y.stride(0), _stride(c.read), _stride(c.residual),
        K=rows, D=width, PARTS=parts, WIDTH=shape["WIDTH"], BM=TILE, BK=shape["BK"], BD=shape["BD"],
        PRECISION=precision, num_warps=8, num_stages=4,
    )  # fmt: skip
    _launch(
        coefficient_tiles, (number, TILE // FEW),
        c.bits, order, tiles, c.row_float, c.row_int, c.slot_int, c.gain, c.before, c.after, c.dose, c.flags, c.rank,
        partial, moments, changes, lengths, c.tokens, _stride(c.rank), c.before.stride(0),
        K=rows, D=width, B=c.gain.shape[3], PARTS=parts, WIDTH=shape["WIDTH"], BM=FEW, BK=16,
        ROOT=math.sqrt(width), num_warps=4,
    )  # fmt: skip
    product: dict[str, Any] = {
        "K": rows, "D_OUT": width_out, "BLOCKS": blocks, "BM": TILE, "BK": shape["BK"],
        "BN": shape["BN"], "PRECISION": precision, "num_warps": 8, "num_stages": 1,
    }  # fmt: skip
    _launch(
        measure_tiles, (number, blocks),
        c.y, c.bits, order, tiles, c.dec, c.slot_int, changes, measures, c.base,
        c.tokens, c.y.stride(0), _stride(c.base), **product,
    )  # fmt: skip
    if c.y.dtype == torch.float16:
        _launch(
            fit_tiles, (number, blocks),
            c.y, c.bits, order, tiles, c.dec, c.slot_float, c.slot_int, changes, lengths, measures, c.base,
            c.tokens, c.y.stride(0), _stride(c.base), **product,
        )  # fmt: skip
    _launch(
        write_tiles, (number, blocks),
        c.y, c.bits, order, tiles, c.dec, c.slot_float, c.slot_int, changes, lengths, measures, c.dose, c.flags, c.base,
        c.tokens, c.y.stride(0), _stride(c.base), **product,
    )  # fmt: skip
