"""``topk_rank``: exact TopK membership of edited features, by counting rather than sorting.

A feature of a TopK dictionary is active if fewer than k pre-activations of the dictionary exceed its own. Only tokens
that edit, or are gated by, such a feature pay for the encode of the whole dictionary.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sae_steer_kernels._call import call
from sae_steer_kernels._op import Op, lazily, torch_op, triton_obstacle
from sae_steer_kernels.feature_edit import EditTable
from sae_steer_kernels.topk_rank.generate import generate
from sae_steer_kernels.topk_rank.reference import topk_rank_reference
from sae_steer_kernels.topk_rank.torch_impl import topk_rank_torch


@dataclass(frozen=True, slots=True)
class RankBuffers:
    """The op's result, and what it keeps between its launches, so that none of them allocates.

    Args:
        rank: ``[T, K]`` int32. Of a row whose pre-activation is above zero: how many other features exceed it, as long
            as they are fewer than k; a number of at least k where they are not. Of another row of the SAE: any number.
            Entries that the op does not rank are left alone.
        moments: ``[T, 3]`` float32, scratch.
        own: ``[T, K]`` float32, scratch.
        which: ``[T, K + 1]`` int32, scratch.
        todo: ``[T + 1]`` int32, scratch.
    """

    rank: Tensor
    moments: Tensor
    own: Tensor
    which: Tensor
    todo: Tensor

    @classmethod
    def empty(cls, *, tokens: int, rows: int, device: torch.device) -> Self:
        """Buffers for steps of up to ``tokens`` tokens and slots of ``rows`` rows."""
        return cls(
            rank=torch.zeros(tokens, rows, dtype=torch.int32, device=device),
            moments=torch.zeros(tokens, 3, device=device),
            own=torch.zeros(tokens, rows, device=device),
            which=torch.zeros(tokens, rows + 1, dtype=torch.int32, device=device),
            todo=torch.zeros(tokens + 1, dtype=torch.int32, device=device),
        )

    def first(self, tokens: int) -> Self:
        """A view for the first ``tokens`` tokens."""
        return type(self)(
            rank=self.rank[:tokens],
            moments=self.moments[:tokens],
            own=self.own[:tokens],
            which=self.which[:tokens],
            todo=self.todo[: tokens + 1],
        )


def _run(
    y: Tensor,
    slots: Tensor,
    active: Tensor,
    table_enc: Tensor,
    table_float: Tensor,
    table_int: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    rank: Tensor,
    moments: Tensor,
    own: Tensor,
    which: Tensor,
    todo: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    tables = (table_enc, table_float, table_int, slot_int)
    buffers = (rank, moments, own, which, todo)
    call(TOPK_RANK, y.device, active, (y, slots, *tables, sae, enc, row_float, row_int, *buffers, read, residual))


_topk_rank = torch_op(_run, name="topk_rank", mutates=("rank", "moments", "own", "which", "todo"))


def topk_rank(
    y: Tensor,
    slots: Tensor,
    active: Tensor,
    table: EditTable,
    sae: int,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    buffers: RankBuffers,
    *,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes, for each TopK row of each token's slot, how many other features of its SAE have a larger pre-activation.

    Args:
        y: ``[T, D_out]`` tensor that is going to be written.
        slots: ``[T]`` int32 slot of each token; 0 = none.
        active: ``[]`` bool on the CPU: whether any token of the step has a slot. False returns at once.
        table: The site's static tables; their rows say which are TopK, and of which SAE.
        sae: Number of this SAE at its site.
        enc: ``[F, D]`` float32, the whole encoder.
        row_float: ``[F, len(RowFloat)]`` of the whole dictionary.
        row_int: ``[F, len(RowInt)]`` of the whole dictionary, with one NORM and one TOPK for all features.
        buffers: The result and the scratch, ``T`` rows.
        read: ``[T, D]`` what is encoded, where it is not ``y``.
        residual: ``[T, D]`` added to what is encoded.
    """
    _topk_rank(
        y, slots, active, table.enc, table.row_float, table.row_int, table.slot_int, sae, enc, row_float, row_int,
        buffers.rank, buffers.moments, buffers.own, buffers.which, buffers.todo, read, residual,
    )  # fmt: skip


def _triton_takes(
    y: Tensor,
    slots: Tensor,
    table_enc: Tensor,
    table_float: Tensor,
    table_int: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    rank: Tensor,
    moments: Tensor,
    own: Tensor,
    which: Tensor,
    todo: Tensor,
    read: Tensor | None,
    residual: Tensor | None,
) -> str:
    if obstacle := triton_obstacle():
        return obstacle
    tables = (table_enc, table_float, table_int, slot_int, row_float, row_int, rank, moments, own, which, todo)
    if not all(t.is_contiguous() for t in tables):
        return "a table or a buffer is not contiguous"
    if any(t is not None and t.stride(-1) != 1 for t in (y, read, residual, enc)):
        return "the elements of a token, or of an encoder row, are not next to each other"
    return ""


TOPK_RANK = Op(
    name="topk_rank",
    reference=topk_rank_reference,
    implementations={
        "torch": topk_rank_torch,
        "triton": lazily("sae_steer_kernels.topk_rank.triton_impl", "topk_rank_triton"),
    },
    by_device={"cpu": "torch", "cuda": "triton"},
    # Ranks are exact, but of pre-activations in float32: two that differ by less than this share of the larger terms of
    # their sums may change places. 24 bits an operation, some thousand operations, errors of random sign.
    tolerances=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16, torch.float64), 4e-6),
    supports={"triton": _triton_takes},
    generate=generate,
    host_free=frozenset({"triton"}),
)
