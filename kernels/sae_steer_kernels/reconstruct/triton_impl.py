"""``reconstruct`` in Triton, for TopK dictionaries: their k largest features, and the sum of those decoder rows.

The number of features that other activations leave is not bounded, and a buffer that is too small for them would drop
some without a word: their dictionaries stay with two matrix products.
"""

# See feature_edit/triton_edit.py.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sae_steer_kernels._tiles import LENGTH, MEAN, MOMENTS, STD, load_x
from sae_steer_kernels.feature_edit.layout import Norm, RowInt, SlotInt
from sae_steer_kernels.sparse_decode.triton_impl import blocks, decoded
from sae_steer_kernels.topk_readout.triton_impl import topk_readout_triton

_NORM = tl.constexpr(int(RowInt.NORM))
_DROP_SAE = tl.constexpr(int(SlotInt.DROP_SAE))
_DROP_SELECT = tl.constexpr(int(SlotInt.DROP_SELECT))
_SLOT_INTS = tl.constexpr(len(SlotInt))
_CENTER = tl.constexpr(int(Norm.CENTER))
_LAYER_NORM = tl.constexpr(int(Norm.LAYER_NORM))
_NORM_RESCALE = tl.constexpr(int(Norm.NORM_RESCALE))
_TOKENS = 256


@triton.jit
def drop_kernel(slots, bits, slot_int, sae, wanted, T, BT: tl.constexpr):
    """Grid ``(T / BT,)``: which tokens drop the error of this SAE."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    there = token < T
    scalars = slot_int + tl.load(slots + token, mask=there, other=0).to(tl.int64) * _SLOT_INTS
    mine = tl.load(scalars + _DROP_SAE, mask=there, other=-1) == sae
    held = tl.load(bits + token, mask=there, other=0) & tl.load(scalars + _DROP_SELECT, mask=there, other=0)
    tl.store(wanted + token, (mine & (held != 0)).to(tl.int32), mask=there)


@triton.jit
def base_kernel(
    y, y_stride, residual, residual_stride, ids, values, wanted, dec, dec_stride, dec_bias, row_int, moments,
    base, base_stride, D, k, ROOT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid ``(T, D_out / BD)``: ``decode(f) - y``, mapped back from the normalised token."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + token) == 0:
        return
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    total = decoded(ids, values, token, dec, dec_stride, columns, inside, k, BK, BD)
    total += tl.load(dec_bias + columns, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(row_int + _NORM)
    if norm == _CENTER:
        total += tl.load(moments + token * MOMENTS + MEAN)
    if norm == _LAYER_NORM:
        total = total * tl.load(moments + token * MOMENTS + STD) + tl.load(moments + token * MOMENTS + MEAN)
    if norm == _NORM_RESCALE:
        total *= tl.load(moments + token * MOMENTS + LENGTH) / ROOT
    total -= load_x(y, y_stride, residual, residual_stride, token, columns, inside)
    tl.store(base + token * base_stride + columns, total, mask=inside)


def reconstruct_triton(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    scratch: Sequence[Tensor],
    read: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Fills ``base``; arguments as in :func:`sae_steer_kernels.reconstruct.reconstruct`."""
    tokens, width = y.shape
    if tokens == 0:
        return
    wanted, ids, values, moments, groups, places, chosen, candidates, todo = scratch
    x = y if read is None else read
    drop_kernel[(triton.cdiv(tokens, _TOKENS),)](
        slots, bits, slot_int, sae, wanted, tokens, BT=_TOKENS, num_warps=4, enable_fp_fusion=True
    )
    topk_readout_triton(
        x, wanted, enc, row_float, row_int, ids, values, moments, groups, places, chosen, candidates, todo, residual
    )
    count, sizes = blocks(width)
    base_kernel[(tokens, count)](
        y, y.stride(0), residual, 0 if residual is None else residual.stride(0),
        ids, values, wanted, dec, dec.stride(0), dec_bias, row_int, moments,
        base, base.stride(0), width, ids.shape[1], ROOT=math.sqrt(x.shape[1]), **sizes,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
