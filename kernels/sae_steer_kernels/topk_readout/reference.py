"""The definition of ``topk_readout``: every feature of a token, in float64, sorted. Slow, and meant to be read."""

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import RowInt
from sae_steer_kernels.feature_edit.reference import activation
from sae_steer_kernels.topk_rank.reference import preactivation


def dictionary_activations(x: Tensor, enc: Tensor, row_float: Tensor, row_int: Tensor) -> list[float]:
    """All activations of a dictionary on one token ``x [D]`` float64."""
    scalars, norms = row_float.double(), row_int[:, RowInt.NORM].tolist()
    pre = [preactivation(x, row.double(), scalars[j], norms[j]) for j, row in enumerate(enc)]
    f = []
    for j, own in enumerate(pre):
        k = int(row_int[j, RowInt.TOPK])
        rank = sum(other > own for other in pre) if k else 0
        f.append(activation(own, int(row_int[j, RowInt.ACT]), scalars[j], rank, k))
    return f


def topk_readout_reference(
    x: Tensor,
    wanted: Tensor,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    k: int,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ids [T, k]`` int32 and ``values [T, k]`` float64; rows of tokens that are not wanted are -1 and 0.

    Arguments as in :func:`sae_steer_kernels.topk_readout.topk_readout`.
    """
    ids = torch.full((x.shape[0], k), -1, dtype=torch.int32)
    values = torch.zeros(x.shape[0], k, dtype=torch.float64)
    for t in range(x.shape[0]):
        if int(wanted[t]) == 0:
            continue
        token = x[t].double()
        if residual is not None:
            token = token + residual[t].double()
        f = dictionary_activations(token, enc, row_float, row_int)
        active = sorted((j for j in range(len(f)) if f[j] > 0), key=lambda j: (-f[j], j))
        for place, j in enumerate(active[:k]):
            ids[t, place], values[t, place] = j, f[j]
    return ids, values
