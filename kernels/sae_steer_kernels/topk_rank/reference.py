"""The definition of ``topk_rank``: one token, one feature at a time, in float64. Slow, and meant to be read."""

import math

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import LAYER_NORM_EPS, Norm, RowFloat, RowInt, SlotInt


def preactivation(x: Tensor, row: Tensor, scalars: Tensor, norm: int) -> float:
    """Pre-activation of one feature on one token: ``x [D]``, ``row [D]``, ``scalars [len(RowFloat)]``, float64."""
    dot = float(row @ x)
    match Norm(norm):
        case Norm.CENTER:
            dot -= float(x.mean()) * float(scalars[RowFloat.ENC_SUM])
        case Norm.LAYER_NORM:
            dot -= float(x.mean()) * float(scalars[RowFloat.ENC_SUM])
            dot /= float(x.std(unbiased=True)) + LAYER_NORM_EPS
        case Norm.NORM_RESCALE:
            dot *= math.sqrt(x.numel()) / float(x.norm())
    return dot + float(scalars[RowFloat.BIAS])


def topk_rank_reference(
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
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``[T, K]`` int32: how many other features exceed each row's own pre-activation; -1 for what is not ranked.

    Arguments as in :func:`sae_steer_kernels.topk_rank.topk_rank`.
    """
    rank = torch.full((y.shape[0], table_enc.shape[1]), -1, dtype=torch.int32)
    for t in range(y.shape[0]):
        s = int(slots[t])
        if s == 0:
            continue
        x = (y if read is None else read)[t].double()
        if residual is not None:
            x = x + residual[t].double()
        everything: list[float] | None = None
        for i in range(int(slot_int[s, SlotInt.ROWS])):
            ints = table_int[s, i]
            if int(ints[RowInt.TOPK]) == 0 or int(ints[RowInt.SAE]) != sae:
                continue
            if everything is None:
                everything = [
                    preactivation(x, enc[j].double(), row_float[j].double(), int(row_int[j, RowInt.NORM]))
                    for j in range(enc.shape[0])
                ]
            own = preactivation(x, table_enc[s, i].double(), table_float[s, i].double(), int(ints[RowInt.NORM]))
            others = (pre for j, pre in enumerate(everything) if j != int(ints[RowInt.FEATURE]))
            rank[t, i] = sum(pre > own for pre in others)
    return rank
