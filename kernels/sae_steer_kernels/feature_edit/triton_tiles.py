"""Kernels of ``feature_edit`` for many tokens of few slots: tokens grouped by slot, products on tensor cores.

Several launches, because a token's delta must be known in length, and known to be finite, before any of it is written:
``encode_tiles`` leaves partial dot products, ``coefficient_tiles`` turns them into activations and edits,
``measure_tiles`` multiplies the decoder rows and keeps only lengths, ``write_tiles`` multiplies again and writes;
float16 alone has ``fit_tiles`` between the last two. So every product is spread over the whole device, which one
program for each tile would not do: a prefill of 2048 tokens has 32 tiles. Nothing is added atomically.

A tile is up to BM tokens of one slot, given as positions in ``order``. Nothing is compiled for a number of tokens, so
that no step has to wait for it.
"""

# See triton_edit.py.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from sae_steer_kernels.feature_edit.layout import Flag, RowFloat, RowInt, Skip, SlotFloat, SlotInt
from sae_steer_kernels.feature_edit.triton_edit import FLOATS, INTS, activated, edited

_ROWS = tl.constexpr(int(SlotInt.ROWS))
_DROP_SELECT = tl.constexpr(int(SlotInt.DROP_SELECT))
_SKIPS = tl.constexpr(int(SlotInt.SKIPS))
_SLOT_INTS = tl.constexpr(len(SlotInt))
_LIMIT = tl.constexpr(int(SlotFloat.DOSE_LIMIT))
_SLOT_FLOATS = tl.constexpr(len(SlotFloat))
_WHEN_ROW = tl.constexpr(int(RowInt.WHEN_ROW))
_SELECT = tl.constexpr(int(RowInt.SELECT))
_ABOVE = tl.constexpr(int(RowFloat.WHEN_ABOVE))
_BELOW = tl.constexpr(int(RowFloat.WHEN_BELOW))
_NO_GATE = tl.constexpr(int(Skip.GATE))
_TOUCHED = tl.constexpr(int(Flag.TOUCHED))
_OVER_DOSE = tl.constexpr(int(Flag.OVER_DOSE))
_NON_FINITE = tl.constexpr(int(Flag.NON_FINITE))


@triton.jit
def _tile(tiles, order, BM: tl.constexpr):
    """Slot of this program's tile, its tokens ``[BM]`` (int64), and which of them there are."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile).to(tl.int64)
    places = tl.load(tile + 1) + tl.arange(0, BM)
    there = places < tl.load(tile + 2)
    return slot, tl.load(order + places, mask=there, other=0).to(tl.int64), there


@triton.jit(do_not_specialize=["tokens"])
def encode_tiles(
    y, order, tiles, enc, slot_int, partial, moments, read, residual,
    tokens, y_stride, read_stride, residual_stride,
    K: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(N, PARTS, K / BK)``: ``partial [PARTS, T, K]`` over WIDTH columns each; ``moments [PARTS, T, 2]``."""
    slot, token, there = _tile(tiles, order, BM)
    part, first = tl.program_id(1), tl.program_id(2) * BK
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    # The first block of rows leaves the moments behind, also where the slot has no rows.
    if (slot == 0) | ((first >= used) & (first > 0)):
        return
    rows = first + tl.arange(0, BK)
    in_use = rows < used
    wide = slot * (K * D) + rows.to(tl.int64)[:, None] * D
    dots = tl.zeros([BM, BK], tl.float32)
    # Mean and sum of squared deviations of what was seen, chunk by chunk: a sum of squares would cancel.
    seen = 0.0
    mean = tl.zeros([BM], tl.float32)
    spread = tl.zeros([BM], tl.float32)
    for start in range(part * WIDTH, tl.minimum(part * WIDTH + WIDTH, D), BD):
        columns = start + tl.arange(0, BD)
        inside = columns < D
        mask = there[:, None] & inside[None, :]
        if read is None:
            x = tl.load(y + token[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            x = tl.load(read + token[:, None] * read_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            x += tl.load(residual + token[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        rows_of = tl.load(enc + wide + columns[None, :], mask=in_use[:, None] & inside[None, :], other=0.0)
        dots = tl.dot(x, rows_of.trans(), dots, input_precision=PRECISION)
        count = tl.minimum(D - start, BD).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / count
        off = tl.where(inside[None, :], x - chunk_mean[:, None], 0.0)
        apart = chunk_mean - mean
        spread += tl.sum(off * off, axis=1) + apart * apart * (seen * count / (seen + count))
        mean += apart * (count / (seen + count))
        seen += count
    here = part.to(tl.int64) * tokens + token
    tl.store(partial + here[:, None] * K + rows[None, :], dots, mask=there[:, None] & in_use[None, :])
    if first == 0:
        tl.store(moments + here * 2, mean, mask=there)
        tl.store(moments + here * 2 + 1, spread, mask=there)


@triton.jit
def _summed(partial, token, rows, mask, tokens, K: tl.constexpr, PARTS: tl.constexpr):
    """Dot products ``[BM, BK]`` from their parts; ``rows`` broadcasts with ``[BM, BK]``."""
    dot = tl.zeros(mask.shape, tl.float32)
    for part in tl.static_range(PARTS):
        dot += tl.load(partial + (part * tokens + token[:, None]) * K + rows, mask=mask, other=0.0)
    return dot


@triton.jit(do_not_specialize=["tokens"])
def coefficient_tiles(
    bits, order, tiles, row_float, row_int, slot_int, gain, before, after, dose, flags, rank,
    partial, moments, changes, lengths, tokens, rank_stride, buffer_stride,
    K: tl.constexpr, D: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Grid ``(N, tokens of a tile / BM)``: ``before``, ``after``, ``changes [T, K]``, ``lengths [T]``, flags so far."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile).to(tl.int64)
    places = tl.load(tile + 1) + tl.program_id(1) * BM + tl.arange(0, BM)
    there = places < tl.load(tile + 2)
    token = tl.load(order + places, mask=there, other=0).to(tl.int64)
    if slot == 0:
        tl.store(flags + token, tl.zeros([BM], tl.int32), mask=there)
        tl.store(dose + token, tl.zeros([BM], tl.float32), mask=there)
        return
    held = tl.load(bits + token, mask=there, other=0)
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    skips = tl.load(slot_int + slot * _SLOT_INTS + _SKIPS)
    mean = tl.zeros([BM], tl.float32)
    spread = tl.zeros([BM], tl.float32)
    for part in tl.static_range(PARTS):
        here = part * tokens + token
        seen = part * WIDTH * 1.0
        count = min(WIDTH, D - part * WIDTH) * 1.0
        apart = tl.load(moments + here * 2, mask=there, other=0.0) - mean
        spread += tl.load(moments + here * 2 + 1, mask=there, other=0.0)
        spread += apart * apart * (seen * count / (seen + count))
        mean += apart * (count / (seen + count))
    length = tl.sqrt(spread + mean * mean * D)
    std = tl.sqrt(spread / (D - 1))
    tl.store(lengths + token, length, mask=there)
    length, mean, std = length[:, None], mean[:, None], std[:, None]

    row_float += slot * (K * FLOATS)
    row_int += slot * (K * INTS)
    gain += slot * (K * 2 * B)
    touched = tl.zeros([BM], tl.int32)
    for first in range(0, used, BK):
        rows = first + tl.arange(0, BK)[None, :]
        mask = there[:, None] & (rows < used)
        floats, ints = row_float + rows * FLOATS, row_int + rows * INTS
        own_rank = 0
        if rank is not None:
            own_rank = tl.load(rank + token[:, None] * rank_stride + rows, mask=mask, other=0)
        dot = _summed(partial, token, rows, mask, tokens, K, PARTS)
        f, written = activated(dot, length, mean, std, own_rank, floats, ints, rows < used, skips, ROOT)
        selected = mask & ((tl.load(ints + _SELECT, mask=rows < used, other=0) & held[:, None]) != 0)
        holds = selected
        if (skips & _NO_GATE) == 0:
            gate = tl.load(ints + _WHEN_ROW, mask=rows < used, other=-1)
            gated = mask & (gate >= 0)
            gate_rank = 0
            if rank is not None:
                gate_rank = tl.load(rank + token[:, None] * rank_stride + gate, mask=gated, other=0)
            gate_dot = _summed(partial, token, gate, gated, tokens, K, PARTS)
            gate_floats, gate_ints = row_float + gate * FLOATS, row_int + gate * INTS
            gate_f, _ = activated(
                gate_dot, length, mean, std, gate_rank, gate_floats, gate_ints, gate >= 0, skips, ROOT
            )
            above = tl.load(floats + _ABOVE, mask=rows < used, other=float("-inf"))
            below = tl.load(floats + _BELOW, mask=rows < used, other=float("inf"))
            holds = holds & ((gate < 0) | ((gate_f > above) & (gate_f < below)))
        new = tl.where(holds, edited(f, length, floats, ints, gain + rows * (2 * B), rows < used, skips, B), f)
        tl.store(before + token[:, None] * buffer_stride + rows, f, mask=mask)
        tl.store(after + token[:, None] * buffer_stride + rows, new, mask=mask)
        tl.store(changes + token[:, None] * K + rows, tl.where(holds, (new - f) * written, 0.0), mask=mask)
        touched = touched | tl.max(selected.to(tl.int32), axis=1)
    tl.store(flags + token, touched * _TOUCHED, mask=there)


@triton.jit
def _delta(
    changes, dec, base, slot, token, there, used, dropped, columns, base_stride,
    K: tl.constexpr, D_OUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of the tile's deltas ``[BM, BN]``, before the limit."""
    inside = columns < D_OUT
    delta = tl.zeros([BM, BN], tl.float32)
    for first in range(0, used, BK):
        rows = first + tl.arange(0, BK)
        in_use = rows < used
        mask = there[:, None] & in_use[None, :]
        change = tl.load(changes + token[:, None] * K + rows[None, :], mask=mask, other=0.0)
        wide = slot * (K * D_OUT) + rows.to(tl.int64)[:, None] * D_OUT
        decoder = tl.load(dec + wide + columns[None, :], mask=in_use[:, None] & inside[None, :], other=0.0)
        delta = tl.dot(change, decoder.to(tl.float32), delta, input_precision=PRECISION)
    if base is not None:
        mask = (there & dropped)[:, None] & inside[None, :]
        delta += tl.load(base + token[:, None] * base_stride + columns[None, :], mask=mask, other=0.0)
    return delta


@triton.jit
def _bad(old, delta, inside):
    """Which tokens ``[BM]`` would not be finite with these columns of their delta: 1 or 0."""
    new = (old.to(tl.float32) + delta).to(old.dtype).to(tl.float32)
    return tl.max((inside[None, :] & ((tl.abs(new) < float("inf")) == 0)).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["tokens"])
def measure_tiles(
    y, bits, order, tiles, dec, slot_int, changes, measures, base, tokens, y_stride, base_stride,
    K: tl.constexpr, D_OUT: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(N, BLOCKS)``: ``measures [3, BLOCKS, T]`` of a block of the delta.

    Its squared length, whether it fails to fit the dtype as it is, and whether it fails to fit as it will be written.
    """
    slot, token, there = _tile(tiles, order, BM)
    if slot == 0:
        return
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    dropped = (tl.load(bits + token, mask=there, other=0) & tl.load(slot_int + slot * _SLOT_INTS + _DROP_SELECT)) != 0
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < D_OUT
    delta = _delta(
        changes, dec, base, slot, token, there, used, dropped, columns, base_stride, K, D_OUT, BM, BK, BN, PRECISION
    )
    pointers = y + token[:, None] * y_stride + columns[None, :]
    old = tl.load(pointers, mask=there[:, None] & inside[None, :], other=0.0)
    bad = _bad(old, delta, inside).to(tl.float32)
    measure = measures + tl.program_id(1) * tokens + token
    tl.store(measure, tl.sum(delta * delta, axis=1), mask=there)
    tl.store(measure + BLOCKS * tokens, bad, mask=there)
    tl.store(measure + 2 * BLOCKS * tokens, bad, mask=there)


@triton.jit
def _judged(
    measures, lengths, token, there, limit, tokens, FIELD: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Dose of each token ``[BM]``, whether it is over the limit, the factor that it is scaled by, whether it fails."""
    square = tl.zeros([BM], tl.float32)
    worst = tl.zeros([BM], tl.float32)
    for first in range(0, BLOCKS, 8):
        blocks = first + tl.arange(0, 8)
        mask = there[:, None] & (blocks < BLOCKS)[None, :]
        measured = measures + blocks[None, :] * tokens + token[:, None]
        square += tl.sum(tl.load(measured, mask=mask, other=0.0), axis=1)
        worst = tl.maximum(worst, tl.max(tl.load(measured + FIELD * BLOCKS * tokens, mask=mask, other=0.0), axis=1))
    size = tl.sqrt(square)
    length = tl.load(lengths + token, mask=there, other=1.0)
    asked = tl.where(size == 0, 0.0, size / length)
    over = asked > limit
    return asked, over, tl.where(over, limit * length / size, 1.0), (worst > 0).to(tl.int32)


@triton.jit(do_not_specialize=["tokens"])
def fit_tiles(
    y, bits, order, tiles, dec, slot_float, slot_int, changes, lengths, measures, base, tokens, y_stride, base_stride,
    K: tl.constexpr, D_OUT: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(N, BLOCKS)``: looks again at deltas that do not fit whole, and may fit scaled down to the limit.

    Only float16 needs it: a delta that is too long for the wider types has no length in float32 either.
    """
    slot, token, there = _tile(tiles, order, BM)
    if slot == 0:
        return
    limit = tl.load(slot_float + slot * _SLOT_FLOATS + _LIMIT)
    _, over, factor, bad = _judged(measures, lengths, token, there, limit, tokens, 1, BLOCKS, BM)
    again = over & (bad > 0) & there
    if tl.max(again.to(tl.int32), axis=0) > 0:
        used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
        drops = tl.load(slot_int + slot * _SLOT_INTS + _DROP_SELECT)
        dropped = (tl.load(bits + token, mask=there, other=0) & drops) != 0
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < D_OUT
        delta = _delta(
            changes, dec, base, slot, token, there, used, dropped, columns, base_stride,
            K, D_OUT, BM, BK, BN, PRECISION,
        )  # fmt: skip
        pointers = y + token[:, None] * y_stride + columns[None, :]
        old = tl.load(pointers, mask=there[:, None] & inside[None, :], other=0.0)
        bad_scaled = _bad(old, delta * factor[:, None], inside).to(tl.float32)
        tl.store(measures + (2 * BLOCKS + tl.program_id(1)) * tokens + token, bad_scaled, mask=again)


@triton.jit(do_not_specialize=["tokens"])
def write_tiles(
    y, bits, order, tiles, dec, slot_float, slot_int, changes, lengths, measures, dose, flags, base,
    tokens, y_stride, base_stride,
    K: tl.constexpr, D_OUT: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(N, BLOCKS)``: multiplies again, and writes what is within the limit and finite."""
    slot, token, there = _tile(tiles, order, BM)
    if slot == 0:
        return
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    limit = tl.load(slot_float + slot * _SLOT_FLOATS + _LIMIT)
    drops = tl.load(slot_int + slot * _SLOT_INTS + _DROP_SELECT)
    dropped = (tl.load(bits + token, mask=there, other=0) & drops) != 0
    asked, over, factor, bad = _judged(measures, lengths, token, there, limit, tokens, 2, BLOCKS, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    delta = _delta(
        changes, dec, base, slot, token, there, used, dropped, columns, base_stride, K, D_OUT, BM, BK, BN, PRECISION
    )
    delta = tl.where(over[:, None], delta * factor[:, None], delta)
    pointers = y + token[:, None] * y_stride + columns[None, :]
    mask = there[:, None] & (columns < D_OUT)[None, :]
    new = (tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + delta).to(y.dtype.element_ty)
    # Where nothing is added nothing is written: -0 + 0 is not the same bits as -0.
    tl.store(pointers, new, mask=mask & (bad == 0)[:, None] & (delta != 0))
    if tl.program_id(1) == 0:
        mark = tl.load(flags + token, mask=there, other=0)
        if base is not None:
            mark = mark | (dropped.to(tl.int32) * _TOUCHED)
        tl.store(flags + token, mark + over.to(tl.int32) * _OVER_DOSE + bad * _NON_FINITE, mask=there)
        tl.store(dose + token, asked, mask=there)
