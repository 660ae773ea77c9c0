"""``topk_readout`` for CPUs, compiled: one walk over the products with the encoder finds the largest.

In plain torch the activations of the whole dictionary are walked some twenty times, which for a decode step's few
tokens takes about as long as the product itself. That product is taken here too where tokens are few: a matrix library
is made for many, and was measured at half the speed with eight. With many it is torch's.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, float64, int32, int64, void
from numpy.typing import NDArray
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import LAYER_NORM_EPS, Act, Norm, RowFloat, RowInt
from sae_steer_kernels.feature_edit.numba_impl import activation, compiling

_BIAS, _ENC_SUM, _ACT, _TOPK = int(RowFloat.BIAS), int(RowFloat.ENC_SUM), int(RowInt.ACT), int(RowInt.TOPK)
_GATED, _TOPK_ACT = int(Act.GATED), int(Act.TOPK)

FEW = 64
"""Products of at most so many tokens are taken here."""


@numba.njit([void(float32[:, ::1], float32[:, ::1], float32[:, ::1])], **compiling)
def _products(enc: Any, x: Any, dots: Any) -> None:
    """Fills ``dots [F, t]`` with the products of ``enc [F, D]`` and ``x [t, D]``, each summed in the same order.

    Four features and four tokens at a time, so that a number that is loaded is used four times. At the ends the last
    one is taken again.
    """
    features, tokens = dots.shape
    zero = np.float32(0)
    for j in range(0, features, 4):
        j1, j2, j3 = min(j + 1, features - 1), min(j + 2, features - 1), min(j + 3, features - 1)
        e0, e1, e2, e3 = enc[j], enc[j1], enc[j2], enc[j3]
        for t in range(0, tokens, 4):
            t1, t2, t3 = min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1)
            x0, x1, x2, x3 = x[t], x[t1], x[t2], x[t3]
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
            s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
            for i in range(enc.shape[1]):
                a, b, c, d = e0[i], e1[i], e2[i], e3[i]
                p, q, r, s = x0[i], x1[i], x2[i], x3[i]
                s00, s01, s02, s03 = s00 + a * p, s01 + a * q, s02 + a * r, s03 + a * s
                s10, s11, s12, s13 = s10 + b * p, s11 + b * q, s12 + b * r, s13 + b * s
                s20, s21, s22, s23 = s20 + c * p, s21 + c * q, s22 + c * r, s23 + c * s
                s30, s31, s32, s33 = s30 + d * p, s31 + d * q, s32 + d * r, s33 + d * s
            dots[j, t], dots[j, t1], dots[j, t2], dots[j, t3] = s00, s01, s02, s03
            dots[j1, t], dots[j1, t1], dots[j1, t2], dots[j1, t3] = s10, s11, s12, s13
            dots[j2, t], dots[j2, t1], dots[j2, t2], dots[j2, t3] = s20, s21, s22, s23
            dots[j3, t], dots[j3, t1], dots[j3, t2], dots[j3, t3] = s30, s31, s32, s33


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


def products(enc: Tensor, x: Tensor) -> Tensor:
    """``enc [F, D]`` times the transpose of ``x [t, D]``, both float32: ``[F, t]``."""
    dots = torch.empty(enc.shape[0], x.shape[0])
    _products(enc.contiguous().numpy(), x.contiguous().numpy(), dots.numpy())
    return dots


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
    tokens = np.flatnonzero(wanted.numpy())
    if not tokens.size:
        return
    # In a step of few tokens all of them mostly are.
    taken = slice(None) if tokens.size == x.shape[0] else torch.from_numpy(tokens)
    read = x[taken].float()
    if residual is not None:
        read = read + residual[taken].float()
    ints = row_int.numpy()[0]
    centre, factor = _normed(read, ints[RowInt.NORM])
    # This way round the tokens of a feature lie together, and what is known of it is looked up once.
    dots = products(enc, read) if tokens.size <= FEW else enc @ read.T
    _largest(dots.numpy(), row_float.numpy(), ints, centre, factor, tokens, ids.numpy(), values.numpy())


def _normed(x: Tensor, norm: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each token's products lose for each unit of the encoder row's sum, and are multiplied by, ``[t]`` each."""
    zero = np.zeros(x.shape[0])
    if norm == Norm.NONE:
        return zero, zero + 1
    exact = x.double()
    if norm == Norm.NORM_RESCALE:
        return zero, (math.sqrt(x.shape[1]) / exact.norm(dim=1)).numpy()
    mean = exact.mean(dim=1).numpy()
    if norm == Norm.CENTER:
        return mean, zero + 1
    return mean, (1 / (exact.std(dim=1, unbiased=True) + LAYER_NORM_EPS)).numpy()


def supports(
    x: Tensor, wanted: Tensor, enc: Tensor, row_float: Tensor, row_int: Tensor, ids: Tensor, values: Tensor, *_: Any
) -> str:
    """Why a call cannot be taken; "" = it can."""
    if all(t.is_contiguous() for t in (row_float, row_int, ids, values)):
        return ""
    return "a table or the result is not contiguous"
