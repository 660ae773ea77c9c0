"""``topk_readout`` in Triton: no ``[T, F]``, no sort, exact.

The dictionary is seen once, and of each group of 32 features it leaves the largest activation, whose it is, and the
second. The k groups with the largest maxima hold the k largest features: a feature of another group is exceeded by k
maxima. Most of those groups hold one of them only, which its second largest says; of the others all features are
computed again. So the last step orders k to 32 k candidates, by counting for each how many precede it.

What each launch does follows from the shapes alone; programs that find nothing to do return. Activations that are
reported are computed from float32 rows, and do not depend on the other tokens of the step.
"""

# See feature_edit/triton_edit.py.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from sae_steer_kernels._launch import dictionary_tile, narrow
from sae_steer_kernels._tiles import (
    LENGTH,
    MEAN,
    MOMENTS,
    STD,
    append,
    load_x,
    moments_of,
    store_moments,
    tile_activations,
)
from sae_steer_kernels.feature_edit.layout import RowInt
from sae_steer_kernels.feature_edit.triton_edit import FLOATS, INTS, activated
from sae_steer_kernels.topk_readout.layout import GROUP

_GROUP = tl.constexpr(GROUP)
_NORM = tl.constexpr(int(RowInt.NORM))
_TOPK = tl.constexpr(int(RowInt.TOPK))
_EVERYTHING = tl.constexpr(0)  # as a Skip: nothing may be left out


@triton.jit
def list_kernel(
    x, x_stride, residual, residual_stride, wanted, row_int, moments, todo, D, BD: tl.constexpr
):  # fmt: skip
    """Grid ``(T,)``: lists the tokens that are wanted, with their moments."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + token) == 0:
        return
    mean, std, length = moments_of(x, x_stride, residual, residual_stride, token, tl.load(row_int + _NORM), D, BD)
    store_moments(moments, token, mean, std, length)
    append(todo, token)


@triton.jit
def scan_kernel(
    x, x_stride, residual, residual_stride, enc, enc_stride, row_float, row_int, moments, groups, places, todo,
    T, D, F, G, ROOT: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of features on one block of wanted tokens: of each group the two largest, and whose the largest is."""
    blocks = tl.cdiv(T, BT)
    block = tl.program_id(0) % blocks
    listed = tl.load(todo)
    if block * BT >= listed:
        return
    member = block * BT + tl.arange(0, BT)
    live = member < listed
    token = tl.load(todo + 1 + member, mask=live, other=0).to(tl.int64)
    tile = tl.program_id(0) // blocks
    feature = (tile * BF + tl.arange(0, BF)).to(tl.int64)
    f = tile_activations(
        x, x_stride, residual, residual_stride, moments, token, live,
        enc, enc_stride, row_float, row_int, feature, feature < F, D, ROOT, _EVERYTHING, BF, BT, BD,
        NARROW, UPCAST,
    )  # fmt: skip
    # Whatever is not above zero is not active, NaN included.
    f = tl.where((f > 0) & (feature < F)[:, None], f, 0.0)
    grouped = tl.reshape(f, (BF // _GROUP, _GROUP, BT))
    inner = tl.arange(0, _GROUP)[None, :, None]
    first = tl.max(grouped, axis=1)
    place = tl.min(tl.where(grouped == first[:, None, :], inner, _GROUP), axis=1)
    second = tl.max(tl.where(inner == place[:, None, :], 0.0, grouped), axis=1)
    group = tile * (BF // _GROUP) + tl.arange(0, BF // _GROUP)
    at = token[None, :] * G + group[:, None]
    mask = live[None, :] & (group < G)[:, None]
    tl.store(groups + at * 2, first, mask=mask)
    tl.store(groups + at * 2 + 1, second, mask=mask)
    tl.store(places + at, place.to(tl.uint8), mask=mask)


@triton.jit
def choose_kernel(groups, chosen, todo, G, k, BG: tl.constexpr):
    """Grid ``(T,)``: the k groups of a token with the largest maxima, in ``chosen [T, k + 1]``; -1 = none.

    The last column is the bits of the smallest of those maxima. Bits of floats that are not negative are ordered as the
    floats are, so that it is found by bisection.
    """
    if tl.program_id(0) >= tl.load(todo):
        return
    token = tl.load(todo + 1 + tl.program_id(0)).to(tl.int64)
    least = 0
    for step in range(31):
        candidate = least | (1 << (30 - step))
        reaching = 0
        for start in range(0, G, BG):
            group = start + tl.arange(0, BG)
            first = tl.load(groups + (token * G + group) * 2, mask=group < G, other=0.0)
            reaching += tl.sum((first.to(tl.int32, bitcast=True) >= candidate).to(tl.int32))
        if reaching >= k:
            least = candidate
    above = 0
    for start in range(0, G, BG):
        group = start + tl.arange(0, BG)
        first = tl.load(groups + (token * G + group) * 2, mask=group < G, other=0.0)
        above += tl.sum((first.to(tl.int32, bitcast=True) > least).to(tl.int32))
    taken = 0
    equal_before = 0
    for start in range(0, G, BG):
        group = start + tl.arange(0, BG)
        bits = tl.load(groups + (token * G + group) * 2, mask=group < G, other=0.0).to(tl.int32, bitcast=True)
        # Of groups that are equal at the edge the first ones are taken: they hold the lowest numbers.
        equal = ((bits == least) & (bits > 0)).to(tl.int32)
        take = (bits > least) | ((equal > 0) & (above + equal_before + tl.cumsum(equal) <= k))
        count = take.to(tl.int32)
        tl.store(chosen + token * (k + 1) + taken + tl.cumsum(count) - 1, group, mask=take)
        taken += tl.sum(count)
        equal_before += tl.sum(equal)
    for rest in range(taken, k):
        tl.store(chosen + token * (k + 1) + rest, -1)
    tl.store(chosen + token * (k + 1) + k, least)


@triton.jit
def value_kernel(
    x, x_stride, residual, residual_stride, enc, enc_stride, row_float, row_int, moments, groups, places,
    chosen, candidates, ids, values, todo, D, F, G, k, ROOT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid ``(T, k)``: activations of a chosen group, ``candidates [T, k, GROUP]``; 0 where there is no candidate."""
    if tl.program_id(0) >= tl.load(todo):
        return
    token = tl.load(todo + 1 + tl.program_id(0)).to(tl.int64)
    slot = tl.program_id(1)
    tl.store(ids + token * k + slot, -1)
    tl.store(values + token * k + slot, 0.0)
    group = tl.load(chosen + token * (k + 1) + slot).to(tl.int64)
    inner = tl.arange(0, _GROUP)
    f = tl.zeros((_GROUP,), dtype=tl.float32)
    if group >= 0:
        at = token * G + group
        least = tl.load(chosen + token * (k + 1) + k)
        several = (tl.load(groups + at * 2 + 1).to(tl.int32, bitcast=True) >= least).to(tl.int32)
        alone = (inner == tl.load(places + at).to(tl.int32)).to(tl.int32)
        feature = group * _GROUP + inner
        needed = (feature < F) & (alone + several > 0)
        dot = tl.zeros((_GROUP,), dtype=tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            value = load_x(x, x_stride, residual, residual_stride, token, d, d < D)
            mask = needed[:, None] & (d < D)[None, :]
            rows = tl.load(enc + d[None, :] + feature[:, None] * enc_stride, mask=mask, other=0.0)
            dot += tl.sum(rows.to(tl.float32) * value[None, :], axis=1)
        mean = tl.load(moments + token * MOMENTS + MEAN)
        std = tl.load(moments + token * MOMENTS + STD)
        length = tl.load(moments + token * MOMENTS + LENGTH)
        floats, ints = row_float + feature * FLOATS, row_int + feature * INTS
        f, _ = activated(dot, length, mean, std, 0, floats, ints, needed, _EVERYTHING, ROOT)
        f = tl.where(needed & (f > 0), f, 0.0)
    tl.store(candidates + (token * k + slot) * _GROUP + inner, f)


@triton.jit
def order_kernel(chosen, candidates, ids, values, row_int, todo, k, BI: tl.constexpr, BJ: tl.constexpr):
    """Grid ``(T, k * GROUP / BI)``: each candidate's place is the number of those before it."""
    if tl.program_id(0) >= tl.load(todo):
        return
    token = tl.load(todo + 1 + tl.program_id(0)).to(tl.int64)
    count = k * _GROUP
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    f = tl.load(candidates + token * count + i, mask=i < count, other=0.0)
    if tl.max(f) == 0:
        return
    # Groups are chosen in their order, so that candidates are in the order of their numbers.
    larger = tl.zeros((BI,), dtype=tl.int32)
    equal = tl.zeros((BI,), dtype=tl.int32)
    for start in range(0, count, BJ):
        j = start + tl.arange(0, BJ)
        other = tl.load(candidates + token * count + j, mask=j < count, other=0.0)
        larger += tl.sum((other[None, :] > f[:, None]).to(tl.int32), axis=1)
        equal += tl.sum(((other[None, :] == f[:, None]) & (j[None, :] < i[:, None])).to(tl.int32), axis=1)
    place = larger + equal
    members = tl.load(row_int + _TOPK)
    held = (f > 0) & (place < k) & (larger < tl.where(members > 0, members, count))
    group = tl.load(chosen + token * (k + 1) + i // _GROUP, mask=held, other=0)
    tl.store(ids + token * k + place, group * _GROUP + i % _GROUP, mask=held)
    tl.store(values + token * k + place, f, mask=held)


def topk_readout_triton(
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
    tokens, width = x.shape
    if tokens == 0:
        return
    features, k, count = enc.shape[0], ids.shape[1], places.shape[1]
    stream = (x, x.stride(0), residual, 0 if residual is None else residual.stride(0))
    whole = (enc, enc.stride(0), row_float, row_int)
    root, chunk = math.sqrt(width), min(128, triton.next_power_of_2(width))
    tile = dictionary_tile(tokens)
    todo[:1].zero_()
    list_kernel[(tokens,)](*stream, wanted, row_int, moments, todo, width, BD=chunk, num_warps=4, enable_fp_fusion=True)
    scan_kernel[(triton.cdiv(features, tile.features) * triton.cdiv(tokens, tile.tokens),)](
        *stream, *whole, moments, groups, places, todo, tokens, width, features, count,
        ROOT=root, BF=tile.features, BT=tile.tokens, BD=tile.width,
        NARROW=narrow(x, residual), UPCAST=tile.upcast, **tile.options,
    )  # fmt: skip
    block = min(4096, triton.next_power_of_2(count))
    choose_kernel[(tokens,)](groups, chosen, todo, count, k, BG=block, num_warps=8, enable_fp_fusion=True)
    value_kernel[(tokens, k)](
        *stream, *whole, moments, groups, places, chosen, candidates, ids, values, todo, width, features, count, k,
        ROOT=root, BD=chunk, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    order_kernel[(tokens, triton.cdiv(k * GROUP, 32))](
        chosen, candidates, ids, values, row_int, todo, k, BI=32, BJ=256, num_warps=4, enable_fp_fusion=True
    )
