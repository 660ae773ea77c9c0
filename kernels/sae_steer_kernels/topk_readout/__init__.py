"""``topk_readout``: the k largest features of each token, for readings.

It needs the encode of the whole dictionary, so only tokens that are read pay for it, and edits never do. Activations
themselves, one for each feature of each token, are not kept anywhere.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sae_steer_kernels._call import call
from sae_steer_kernels._op import Op, lazily, torch_op, triton_obstacle
from sae_steer_kernels.topk_readout.generate import generate
from sae_steer_kernels.topk_readout.layout import GROUP
from sae_steer_kernels.topk_readout.reference import topk_readout_reference
from sae_steer_kernels.topk_readout.torch_impl import topk_readout_torch

_NUMBA = "sae_steer_kernels.topk_readout.numba_impl"


@dataclass(frozen=True, slots=True)
class ReadoutBuffers:
    """The op's result, and what it keeps between its launches; ``G = ceil(F / 32)`` groups of features.

    Args:
        ids: ``[T, k]`` int32 numbers of the largest features, the largest first, the lower number first among equals;
            -1 where fewer than k are active.
        values: ``[T, k]`` float32, their activations in the units of the dictionary; 0 where there is none.
        moments: ``[T, 3]`` float32, scratch.
        groups: ``[T, G, 2]`` float32, scratch.
        places: ``[T, G]`` uint8, scratch.
        chosen: ``[T, k + 1]`` int32, scratch.
        candidates: ``[T, k, 32]`` float32, scratch.
        todo: ``[T + 1]`` int32, scratch.
    """

    ids: Tensor
    values: Tensor
    moments: Tensor
    groups: Tensor
    places: Tensor
    chosen: Tensor
    candidates: Tensor
    todo: Tensor

    @classmethod
    def empty(cls, *, tokens: int, features: int, k: int, device: torch.device) -> Self:
        """Buffers for steps of up to ``tokens`` tokens."""
        groups = -(-features // GROUP)
        return cls(
            ids=torch.full((tokens, k), -1, dtype=torch.int32, device=device),
            values=torch.zeros(tokens, k, device=device),
            moments=torch.zeros(tokens, 3, device=device),
            groups=torch.zeros(tokens, groups, 2, device=device),
            places=torch.zeros(tokens, groups, dtype=torch.uint8, device=device),
            chosen=torch.zeros(tokens, k + 1, dtype=torch.int32, device=device),
            candidates=torch.zeros(tokens, k, GROUP, device=device),
            todo=torch.zeros(tokens + 1, dtype=torch.int32, device=device),
        )

    @property
    def all(self) -> tuple[Tensor, ...]:
        """In the order in which the op takes them."""
        return (
            self.ids, self.values, self.moments, self.groups, self.places, self.chosen, self.candidates, self.todo,
        )  # fmt: skip

    def first(self, tokens: int) -> Self:
        """A view for the first ``tokens`` tokens."""
        return type(self)(
            ids=self.ids[:tokens],
            values=self.values[:tokens],
            moments=self.moments[:tokens],
            groups=self.groups[:tokens],
            places=self.places[:tokens],
            chosen=self.chosen[:tokens],
            candidates=self.candidates[:tokens],
            todo=self.todo[: tokens + 1],
        )


def _run(
    x: Tensor,
    wanted: Tensor,
    active: Tensor,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    ids: Tensor,
    values: Tensor,
    moments: Tensor,
    groups: Tensor,
    places: Tensor,
    chosen: Tensor,
    candidates: Tensor,
    todo: Tensor,
    residual: Tensor | None = None,
) -> None:
    buffers = (ids, values, moments, groups, places, chosen, candidates, todo)
    call(TOPK_READOUT, x.device, active, (x, wanted, enc, row_float, row_int, *buffers, residual))


_topk_readout = torch_op(
    _run,
    name="topk_readout",
    mutates=("ids", "values", "moments", "groups", "places", "chosen", "candidates", "todo"),
)


def topk_readout(
    x: Tensor,
    wanted: Tensor,
    active: Tensor,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    buffers: ReadoutBuffers,
    *,
    residual: Tensor | None = None,
) -> None:
    """Writes the largest features of the tokens that are wanted; the rows of others are left alone.

    Args:
        x: ``[T, D]`` what is encoded.
        wanted: ``[T]`` int32; 0 = the token is not read.
        active: ``[]`` bool on the CPU: whether any token of the step is read. False returns at once.
        enc: ``[F, D]`` float32, the whole encoder.
        row_float: ``[F, len(RowFloat)]`` of the whole dictionary.
        row_int: ``[F, len(RowInt)]`` of the whole dictionary, with one ACT, one NORM and one TOPK for all features.
        buffers: The result, whose width is k, and the scratch, ``T`` rows.
        residual: ``[T, D]`` added to what is encoded.
    """
    # Without a graph to hold it, there is nothing that the op's own dispatch would be good for.
    run: Callable[..., None] = _topk_readout if torch.compiler.is_compiling() else _run
    run(x, wanted, active, enc, row_float, row_int, *buffers.all, residual)


def _triton_takes(x: Tensor, wanted: Tensor, enc: Tensor, *rest: Tensor | None) -> str:
    if obstacle := triton_obstacle():
        return obstacle
    *packed, residual = rest
    if not all(t is not None and t.is_contiguous() for t in (wanted, *packed)):
        return "a table or a buffer is not contiguous"
    if any(t is not None and t.stride(-1) != 1 for t in (x, residual, enc)):
        return "the elements of a token, or of an encoder row, are not next to each other"
    return ""


TOPK_READOUT = Op(
    name="topk_readout",
    reference=topk_readout_reference,
    implementations={
        "torch": topk_readout_torch,
        "numba": lazily(_NUMBA, "topk_readout_numba"),
        "triton": lazily("sae_steer_kernels.topk_readout.triton_impl", "topk_readout_triton"),
    },
    # Numba comes with vLLM.
    by_device={"cpu": "numba" if importlib.util.find_spec("numba") else "torch", "cuda": "triton"},
    # Error of an activation, as a share of the larger terms of its sum: float32, 24 bits an operation, some thousand
    # operations, errors of random sign. Features that are nearer to each other than that may change places.
    tolerances=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16, torch.float64), 4e-6),
    supports={"numba": lazily(_NUMBA, "supports"), "triton": _triton_takes},
    generate=generate,
    host_free=frozenset({"triton"}),
)
