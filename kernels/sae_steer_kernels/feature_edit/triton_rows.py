"""Kernels of ``feature_edit`` with a token in registers: one program a token, or several that share its rows.

``edit_row`` does all of a token. With few tokens that would leave most of the device idle, so ``edit_split`` gives
each token ``SPLITS`` programs, each with some of the slot's rows and a partial delta of its own, and ``finish_row``
sums those in a fixed order: no atomics, so that every tensor-parallel rank gets the same bits.
"""

# See triton_edit.py.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from sae_steer_kernels.feature_edit.layout import Flag, RowFloat, RowInt, Skip, SlotFloat, SlotInt
from sae_steer_kernels.feature_edit.regimes import TAIL
from sae_steer_kernels.feature_edit.triton_edit import FLOATS, INTS, NO_NORM, activated, edited

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

# Beside a token's partial deltas: its length, and from _MARKS on, whether each program's rows touched it.
_TAIL = tl.constexpr(TAIL)
_MARKS = tl.constexpr(TAIL // 2)


@triton.jit
def _token(y, read, residual, token, y_stride, read_stride, residual_stride, D: tl.constexpr, BD: tl.constexpr):
    """``x [1, BD]`` of a token in float32, zero beyond ``D``, and its lanes."""
    lanes = tl.arange(0, BD)[None, :]
    inside = lanes < D
    if read is None:
        x = tl.load(y + token * y_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(read + token * read_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + token * residual_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    return x, lanes


@triton.jit
def _moments(x, lanes, skips, D: tl.constexpr):
    """Length, mean and unbiased standard deviation of a token; the latter two only where a row may ask for them."""
    length = tl.sqrt(tl.sum(x * x))
    mean = 0.0
    std = 0.0
    if (skips & NO_NORM) == 0:
        mean = tl.sum(x) / D
        off = tl.where(lanes < D, x - mean, 0.0)
        std = tl.sqrt(tl.sum(off * off) / (D - 1))
    return length, mean, std


@triton.jit
def _dots(x, enc, rows, mask, lanes, D: tl.constexpr):
    """``<enc[row], x>`` of rows ``[BK]``."""
    pointers = enc + rows.to(tl.int64)[:, None] * D + lanes
    return tl.sum(tl.load(pointers, mask=mask[:, None] & (lanes < D), other=0.0) * x, axis=1)


@triton.jit
def _ranks(rank, token, rank_stride, rows, mask):
    ranks = tl.zeros(rows.shape, tl.int32)
    if rank is not None:
        ranks = tl.load(rank + token * rank_stride + rows, mask=mask, other=0)
    return ranks


@triton.jit
def _edit_rows(
    x, lanes, length, mean, std, token, held, skips, start, stop,
    enc, dec, row_float, row_int, gain, before, after, rank, buffer_stride, rank_stride,
    D: tl.constexpr, D_OUT: tl.constexpr, B: tl.constexpr, BD_OUT: tl.constexpr, BK: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Edits rows ``start`` to ``stop`` of a token's slot, BK at a time.

    Table pointers are those of the slot. Returns the delta ``[1, BD_OUT]`` and whether a selector met the token's bits.
    """
    out_lanes = tl.arange(0, BD_OUT)[None, :]
    delta = tl.zeros([1, BD_OUT], tl.float32)
    touched = 0
    for first in range(start, stop, BK):
        rows = first + tl.arange(0, BK)
        mask = rows < stop
        floats, ints = row_float + rows * FLOATS, row_int + rows * INTS
        # Asked for before the dot products are reduced: neither needs the other, and a decode step is waiting.
        wide = rows.to(tl.int64)[:, None] * D_OUT + out_lanes
        decoder = tl.load(dec + wide, mask=mask[:, None] & (out_lanes < D_OUT), other=0.0).to(tl.float32)
        dot = _dots(x, enc, rows, mask, lanes, D)
        own_rank = _ranks(rank, token, rank_stride, rows, mask)
        f, written = activated(dot, length, mean, std, own_rank, floats, ints, mask, skips, ROOT)
        selected = mask & ((tl.load(ints + _SELECT, mask=mask, other=0) & held) != 0)
        holds = selected
        if (skips & _NO_GATE) == 0:
            gate = tl.load(ints + _WHEN_ROW, mask=mask, other=-1)
            gated = mask & (gate >= 0)
            # The gate's row may be another program's, or one of a later turn: it is computed again, in the same way.
            gate_dot = _dots(x, enc, gate, gated, lanes, D)
            gate_rank = _ranks(rank, token, rank_stride, gate, gated)
            gate_floats, gate_ints = row_float + gate * FLOATS, row_int + gate * INTS
            gate_f, _ = activated(gate_dot, length, mean, std, gate_rank, gate_floats, gate_ints, gated, skips, ROOT)
            above = tl.load(floats + _ABOVE, mask=mask, other=float("-inf"))
            below = tl.load(floats + _BELOW, mask=mask, other=float("inf"))
            holds = holds & ((gate < 0) | ((gate_f > above) & (gate_f < below)))
        new = tl.where(holds, edited(f, length, floats, ints, gain + rows * (2 * B), mask, skips, B), f)
        tl.store(before + token * buffer_stride + rows, f, mask=mask)
        tl.store(after + token * buffer_stride + rows, new, mask=mask)
        change = tl.where(holds, (new - f) * written, 0.0)
        delta += tl.sum(change[:, None] * decoder, axis=0)[None, :]
        touched = touched | tl.max(selected.to(tl.int32), axis=0)
    return delta, touched


@triton.jit
def _write(
    delta, length, touched, token, slot, y, base, dose, flags, slot_float, slot_int, held, y_stride, base_stride,
    D_OUT: tl.constexpr, BD_OUT: tl.constexpr,
):  # fmt: skip
    """Adds a token's delta ``[1, BD_OUT]`` to ``y``, within the limit, unless that is not finite; reports."""
    lanes = tl.arange(0, BD_OUT)[None, :]
    inside = lanes < D_OUT
    pointers = y + token * y_stride + lanes
    old = tl.load(pointers, mask=inside, other=0.0)
    if base is not None:  # noqa: SIM102 - this is known when the kernel is compiled, what follows is not
        if (tl.load(slot_int + slot * _SLOT_INTS + _DROP_SELECT) & held) != 0:
            touched = 1
            delta += tl.load(base + token * base_stride + lanes, mask=inside, other=0.0)
    size = tl.sqrt(tl.sum(delta * delta))
    asked = tl.where(size == 0, 0.0, size / length)
    limit = tl.load(slot_float + slot * _SLOT_FLOATS + _LIMIT)
    over = asked > limit
    delta = tl.where(over, delta * (limit * length / size), delta)
    new = (old.to(tl.float32) + delta).to(old.dtype)
    bad = tl.max((inside & ((tl.abs(new.to(tl.float32)) < float("inf")) == 0)).to(tl.int32))
    # Where nothing is added nothing is written: -0 + 0 is not the same bits as -0.
    if bad == 0:
        tl.store(pointers, new, mask=inside & (delta != 0))
    tl.store(dose + token, asked)
    mark = touched * _TOUCHED + over.to(tl.int32) * _OVER_DOSE + bad * _NON_FINITE
    tl.store(flags + token, mark)


@triton.jit
def edit_row(
    y, slots, bits, enc, dec, row_float, row_int, slot_float, slot_int, gain, before, after, dose, flags,
    read, residual, base, rank, y_stride, read_stride, residual_stride, base_stride, rank_stride, buffer_stride,
    K: tl.constexpr, D: tl.constexpr, D_OUT: tl.constexpr, B: tl.constexpr,
    BD: tl.constexpr, BD_OUT: tl.constexpr, BK: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Grid ``(T,)``: all of a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot == 0:
        tl.store(flags + token, 0)
        tl.store(dose + token, 0.0)
        return
    held = tl.load(bits + token)
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    skips = tl.load(slot_int + slot * _SLOT_INTS + _SKIPS)
    x, lanes = _token(y, read, residual, token, y_stride, read_stride, residual_stride, D, BD)
    length, mean, std = _moments(x, lanes, skips, D)
    delta, touched = _edit_rows(
        x, lanes, length, mean, std, token, held, skips, 0, used,
        enc + slot * (K * D), dec + slot * (K * D_OUT), row_float + slot * (K * FLOATS), row_int + slot * (K * INTS),
        gain + slot * (K * 2 * B), before, after, rank, buffer_stride, rank_stride, D, D_OUT, B, BD_OUT, BK, ROOT,
    )  # fmt: skip
    _write(
        delta, length, touched, token, slot, y, base, dose, flags, slot_float, slot_int, held, y_stride, base_stride,
        D_OUT, BD_OUT,
    )  # fmt: skip


@triton.jit
def _share(used, SPLITS: tl.constexpr, BK: tl.constexpr):
    """Rows of each of a token's programs: whole turns of BK, so that few rows have few programs."""
    return tl.cdiv(tl.cdiv(used, SPLITS), BK) * BK


@triton.jit
def edit_split(
    y, slots, bits, enc, dec, row_float, row_int, slot_int, gain, before, after, scratch,
    read, residual, rank, y_stride, read_stride, residual_stride, rank_stride, buffer_stride,
    K: tl.constexpr, D: tl.constexpr, D_OUT: tl.constexpr, B: tl.constexpr,
    BD: tl.constexpr, BD_OUT: tl.constexpr, BK: tl.constexpr, ROOT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid ``(T, SPLITS)``: some rows of a token, to a partial delta in ``scratch [T, SPLITS * D_OUT + _TAIL]``."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot == 0:
        return
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    share = _share(used, SPLITS, BK)
    start = split * share
    # The first program leaves the token's length behind, also where the slot has no rows.
    if (start >= used) & (split > 0):
        return
    held = tl.load(bits + token)
    skips = tl.load(slot_int + slot * _SLOT_INTS + _SKIPS)
    x, lanes = _token(y, read, residual, token, y_stride, read_stride, residual_stride, D, BD)
    length, mean, std = _moments(x, lanes, skips, D)
    delta, touched = _edit_rows(
        x, lanes, length, mean, std, token, held, skips, start, tl.minimum(start + share, used),
        enc + slot * (K * D), dec + slot * (K * D_OUT), row_float + slot * (K * FLOATS), row_int + slot * (K * INTS),
        gain + slot * (K * 2 * B), before, after, rank, buffer_stride, rank_stride, D, D_OUT, B, BD_OUT, BK, ROOT,
    )  # fmt: skip
    mine = scratch + token * (SPLITS * D_OUT + _TAIL)
    out_lanes = tl.arange(0, BD_OUT)[None, :]
    tl.store(mine + split * D_OUT + out_lanes, delta, mask=out_lanes < D_OUT)
    tl.store(mine + SPLITS * D_OUT + _MARKS + split, touched.to(tl.float32))
    if split == 0:
        tl.store(mine + SPLITS * D_OUT, length)


@triton.jit
def finish_row(
    y, slots, bits, slot_float, slot_int, dose, flags, scratch, base, y_stride, base_stride,
    D_OUT: tl.constexpr, BD_OUT: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid ``(T,)``: sums what ``edit_split`` left, and writes."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot == 0:
        tl.store(flags + token, 0)
        tl.store(dose + token, 0.0)
        return
    held = tl.load(bits + token)
    used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)
    share = _share(used, SPLITS, BK)
    mine = scratch + token * (SPLITS * D_OUT + _TAIL)
    lanes = tl.arange(0, BD_OUT)[None, :]
    delta = tl.zeros([1, BD_OUT], tl.float32)
    for split in tl.static_range(SPLITS):  # unrolled, so that all loads are under way at once
        there = tl.where(split * share < used, D_OUT, 0)
        delta += tl.load(mine + split * D_OUT + lanes, mask=lanes < there, other=0.0)
    splits = tl.arange(0, SPLITS)
    marks = tl.load(mine + SPLITS * D_OUT + _MARKS + splits, mask=splits * share < used, other=0.0)
    touched = (tl.max(marks, axis=0) > 0).to(tl.int32)
    _write(
        delta, tl.load(mine + SPLITS * D_OUT), touched, token, slot, y, base, dose, flags, slot_float, slot_int, held,
        y_stride, base_stride, D_OUT, BD_OUT,
    )  # fmt: skip
