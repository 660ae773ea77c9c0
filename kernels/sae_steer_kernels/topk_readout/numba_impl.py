"""``topk_readout`` for CPUs, compiled: the product with the encoder is torch's, and one walk over it finds the largest.

In plain torch the activations of the whole dictionary are walked some twenty times, which for a decode step's few
tokens takes about as long as the product itself.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, float64, int32, int64, void
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import LAYER_NORM_EPS, Act, Norm, RowFloat, RowInt
from sae_steer_kernels.feature_edit.numba_impl import activation, compiling

_BIAS, _ENC_SUM, _ACT, _TOPK = int(RowFloat.BIAS), int(RowFloat.ENC_SUM), int(RowInt.ACT), int(RowInt.TOPK)
_GATED, _TOPK_ACT = int(Act.GATED), int(Act.TOPK)


@numba.njit(
    [
        void(
            float32[:, ::1], float32[:, ::1], int32[::1], float64[::1], float64[::1], int64[::1],
            int32[:, ::1], float32[:, ::1],
        )
    ],
    **compiling,
)  # fmt: skip
def _largest(
    dots: Any, row_float: Any, ints: Any, centre: Any, factor: Any, tokens: Any, ids: Any, values: Any
) -> None:
    """Fills the rows ``tokens [t]`` of ``ids`` and ``values [T, k]`` from ``dots [F, t]``.

    A pre-activation is ``(dot - centre[t] sum(enc[j])) factor[t] + bias[j]``; ``ints`` is what all features share.
    """
    k = ids.shape[1]
    bounded = ints[_ACT] != _GATED  # no other activation exceeds its pre-activation where that is positive
    for token in tokens:
        ids[token] = -1
        values[token] = 0
    for j in range(dots.shape[0]):
        floats = row_float[j]
        for i in range(tokens.size):
            token = tokens[i]
            pre = np.float32((dots[j, i] - centre[i] * floats[_ENC_SUM]) * factor[i] + floats[_BIAS])
            least = values[token, k - 1]
            if bounded and not pre > least:
                continue
            f = activation(pre, floats, ints, 0)
            if not f > least:  # nor is NaN
                continue
            place = k - 1
            while place > 0 and values[token, place - 1] < f:
                values[token, place], ids[token, place] = values[token, place - 1], ids[token, place - 1]
                place -= 1
            values[token, place], ids[token, place] = f, j
    if ints[_ACT] == _TOPK_ACT:
        for token in tokens:
            above = 0  # features that are larger than the one looked at
            for place in range(k):
                if place and values[token, place] < values[token, place - 1]:
                    above = place
                if above >= ints[_TOPK]:
                    values[token, place:], ids[token, place:] = 0, -1
                    break


def topk_readout_numba(
    x: Tensor,
    wanted: Tensor,
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
    residual: Tensor | None,
) -> None:
    """Fills ``ids`` and ``values``; arguments as in :func:`sae_steer_kernels.topk_readout.topk_readout`."""
    tokens = wanted.nonzero().squeeze(1)
    if tokens.numel() == 0:
        return
    read = x[tokens].float()
    if residual is not None:
        read = read + residual[tokens].float()
    centre, factor = _normed(read, int(row_int[0, RowInt.NORM]))
    # This way round the tokens of a feature lie together, and what is known of it is looked up once.
    dots = enc @ read.T
    arguments: list[Any] = [t.numpy() for t in (dots, row_float, row_int[0], centre, factor, tokens, ids, values)]
    _largest(*arguments)


def _normed(x: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    """What each token's products lose for each unit of the encoder row's sum, and are multiplied by, ``[t]`` each."""
    zero = torch.zeros(x.shape[0], dtype=torch.float64)
    if norm == Norm.NONE:
        return zero, zero + 1
    exact = x.double()
    if norm == Norm.NORM_RESCALE:
        return zero, math.sqrt(x.shape[1]) / exact.norm(dim=1)
    if norm == Norm.CENTER:
        return exact.mean(dim=1), zero + 1
    return exact.mean(dim=1), 1 / (exact.std(dim=1, unbiased=True) + LAYER_NORM_EPS)


def supports(
    x: Tensor, wanted: Tensor, enc: Tensor, row_float: Tensor, row_int: Tensor, ids: Tensor, values: Tensor, *_: Any
) -> str:
    """Why a call cannot be taken; "" = it can."""
    if all(t.is_contiguous() for t in (row_float, row_int, ids, values)):
        return ""
    return "a table or the result is not contiguous"
