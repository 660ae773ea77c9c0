"""``topk_rank`` in Triton: the tokens' own rows first, then a count in the epilogue of the encode product.

Two launches, and no ``[T, F]``. The first finds what is undecided: a row whose pre-activation is not above zero is
inactive whatever its rank. The second lets each program multiply one tile of the dictionary with one block of
undecided tokens, and add how many features of the tile are larger. A program whose block was decided meanwhile, because
k larger features were found for each of its rows, reads nothing. The sums are of integers, so their order is of no
matter.
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
from sae_steer_kernels._tiles import append, load_x, moments_of, store_moments, tile_activations
from sae_steer_kernels.feature_edit.layout import RowInt, Skip, SlotInt
from sae_steer_kernels.feature_edit.triton_edit import FLOATS, INTS, activated

_ROWS = tl.constexpr(int(SlotInt.ROWS))
_SLOT_INTS = tl.constexpr(len(SlotInt))
_NORM = tl.constexpr(int(RowInt.NORM))
_TOPK = tl.constexpr(int(RowInt.TOPK))
_SAE = tl.constexpr(int(RowInt.SAE))
_FEATURE = tl.constexpr(int(RowInt.FEATURE))
# A row is a TopK one here: of the activations nothing but max(pre, 0) is asked for.
_PLAIN = tl.constexpr(int(Skip.ACTIVATION))


@triton.jit
def own_kernel(
    x, x_stride, residual, residual_stride, slots, table_enc, table_float, table_int, slot_int, sae,
    rank, moments, own, which, todo, D, K,
    ROOT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid ``(T,)``: the activations of a token's TopK rows, and which of them only the whole dictionary decides.

    Those are listed in ``own [T, K]`` and ``which [T, K + 1]``, the latter after their number.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot == 0:
        return
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    norm = -1
    mean = 0.0
    std = 1.0
    length = 1.0
    undecided = 0
    for start in range(0, used, BK):
        row = start + tl.arange(0, BK)
        place = slot * K + row
        k = tl.load(table_int + place * INTS + _TOPK, mask=row < used, other=0)
        ranked = (k > 0) & (tl.load(table_int + place * INTS + _SAE, mask=row < used, other=-1) == sae)
        if tl.max(ranked.to(tl.int32)) > 0:
            if norm < 0:
                # Rows of one dictionary have one normalisation.
                norm = tl.max(tl.load(table_int + place * INTS + _NORM, mask=ranked, other=0))
                mean, std, length = moments_of(x, x_stride, residual, residual_stride, token, norm, D, BD)
            dot = tl.zeros((BK,), dtype=tl.float32)
            for begin in range(0, D, BD):
                d = begin + tl.arange(0, BD)
                value = load_x(x, x_stride, residual, residual_stride, token, d, d < D)
                mask = ranked[:, None] & (d < D)[None, :]
                rows = tl.load(table_enc + place[:, None] * D + d[None, :], mask=mask, other=0.0)
                dot += tl.sum(rows.to(tl.float32) * value[None, :], axis=1)
            floats, ints = table_float + place * FLOATS, table_int + place * INTS
            f, _ = activated(dot, length, mean, std, 0, floats, ints, ranked, _PLAIN, ROOT)
            # NaN has nothing above it, and so stays the active feature that the token's result shows.
            tl.store(rank + token * K + row, tl.where(f == 0, k, 0), mask=ranked)
            open_ = ranked & (f > 0)
            at = undecided + tl.cumsum(open_.to(tl.int32)) - 1
            tl.store(own + token * K + at, f, mask=open_)
            tl.store(which + token * (K + 1) + 1 + at, row, mask=open_)
            undecided += tl.sum(open_.to(tl.int32))
    if undecided > 0:
        tl.store(which + token * (K + 1), undecided)
        store_moments(moments, token, mean, std, length)
        append(todo, token)


@triton.jit
def count_kernel(
    x, x_stride, residual, residual_stride, slots, table_int, enc, enc_stride, row_float, row_int,
    rank, moments, own, which, todo, T, D, F, K,
    ROOT: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of features against one block of undecided tokens: adds how many exceed each undecided row."""
    # Blocks of tokens run fastest, so that those of one tile find its encoder rows in the cache.
    blocks = tl.cdiv(T, BT)
    block = tl.program_id(0) % blocks
    listed = tl.load(todo)
    if block * BT >= listed:
        return
    member = block * BT + tl.arange(0, BT)
    live = member < listed
    token = tl.load(todo + 1 + member, mask=live, other=0).to(tl.int64)
    rows = tl.load(which + token * (K + 1), mask=live, other=0)
    most = tl.max(rows)
    k = tl.load(row_int + _TOPK)
    # Counts that other programs are adding to: an old value costs time, and never the answer.
    fewest = k
    for i in range(0, most):
        row = tl.load(which + token * (K + 1) + 1 + i, mask=i < rows, other=0)
        fewest = tl.minimum(fewest, tl.min(tl.load(rank + token * K + row, mask=i < rows, other=2147483647)))
    if fewest >= k:
        return

    feature = tl.program_id(0) // blocks * BF + tl.arange(0, BF)
    exists = feature < F
    f = tile_activations(
        x, x_stride, residual, residual_stride, moments, token, live,
        enc, enc_stride, row_float, row_int, feature.to(tl.int64), exists, D, ROOT, _PLAIN, BF, BT, BD,
        NARROW, UPCAST,
    )  # fmt: skip
    # Beyond the end of the dictionary nothing is larger than anything.
    f = tl.where(exists[:, None], f, 0.0)
    slot = tl.load(slots + token, mask=live, other=0).to(tl.int64)
    for i in range(0, most):
        asks = i < rows
        row = tl.load(which + token * (K + 1) + 1 + i, mask=asks, other=0)
        threshold = tl.load(own + token * K + i, mask=asks, other=float("inf"))
        # The feature itself is left out of the count: the two products may round it differently.
        itself = tl.load(table_int + (slot * K + row) * INTS + _FEATURE, mask=asks, other=-1)
        larger = (feature[:, None] != itself[None, :]) & (f > threshold[None, :])
        found = tl.sum(larger.to(tl.int32), axis=0)
        tl.atomic_add(rank + token * K + row, found, mask=asks & (found > 0), sem="relaxed")


def topk_rank_triton(
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
) -> None:
    """Fills ``rank``; arguments as in :func:`sae_steer_kernels.topk_rank.topk_rank`."""
    x = y if read is None else read
    tokens, width = x.shape
    if tokens == 0:
        return
    features, rows = enc.shape[0], table_enc.shape[1]
    stream = (x, x.stride(0), residual, 0 if residual is None else residual.stride(0))
    tile = dictionary_tile(tokens)
    todo[:1].zero_()
    own_kernel[(tokens,)](
        *stream, slots, table_enc, table_float, table_int, slot_int, sae,
        rank, moments, own, which, todo, width, rows,
        ROOT=math.sqrt(width), BK=min(8, triton.next_power_of_2(rows)), BD=min(512, triton.next_power_of_2(width)),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    count_kernel[(triton.cdiv(features, tile.features) * triton.cdiv(tokens, tile.tokens),)](
        *stream, slots, table_int, enc, enc.stride(0), row_float, row_int,
        rank, moments, own, which, todo, tokens, width, features, rows,
        ROOT=math.sqrt(width), BF=tile.features, BT=tile.tokens, BD=tile.width,
        NARROW=narrow(x, residual), UPCAST=tile.upcast, **tile.options,
    )  # fmt: skip
