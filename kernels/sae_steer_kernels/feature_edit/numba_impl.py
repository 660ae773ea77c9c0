"""``feature_edit`` for CPUs, compiled: a decode step's few tokens, one after the other, in one call.

In plain torch a small step is some fifty operations a site, each far dearer to dispatch than to compute, all the more
when the model in between has emptied the caches. Steps of many tokens stay with torch, whose matrix products win there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, float64, int32, uint16, void
from numpy.typing import NDArray
from torch import Tensor

from sae_steer_kernels._op import NAMESPACE
from sae_steer_kernels._regions import traced
from sae_steer_kernels.feature_edit.layout import (
    LAYER_NORM_EPS,
    Act,
    Flag,
    Norm,
    RowFloat,
    RowInt,
    SlotFloat,
    SlotInt,
)
from sae_steer_kernels.feature_edit.torch_impl import edit_by_torch

FEW = 64
"""Steps of at most so many tokens are edited here."""

# The smallest magnitude that a dtype rounds to infinity: half a step beyond its largest number.
_OVERFLOWS = {torch.float32: math.inf, torch.bfloat16: 2.0**128 - 2.0**119}

# The compiler takes plain numbers for constants, and not members of enumerations.
_BIAS, _THETA, _SCALE, _SHIFT = (int(c) for c in (RowFloat.BIAS, RowFloat.THETA, RowFloat.SCALE, RowFloat.SHIFT))
_MAG_SCALE, _MAG_BIAS, _ENC_SUM = int(RowFloat.MAG_SCALE), int(RowFloat.MAG_BIAS), int(RowFloat.ENC_SUM)
_LO, _HI, _MASK_LO, _MASK_HI = (int(c) for c in (RowFloat.LO, RowFloat.HI, RowFloat.MASK_LO, RowFloat.MASK_HI))
_GAMMA, _ABOVE, _BELOW = int(RowFloat.GAMMA), int(RowFloat.WHEN_ABOVE), int(RowFloat.WHEN_BELOW)
_WIDTH_POS, _WIDTH_NEG = int(RowFloat.GAIN_WIDTH_POS), int(RowFloat.GAIN_WIDTH_NEG)
_ACT, _NORM, _UNITS, _GATE = int(RowInt.ACT), int(RowInt.NORM), int(RowInt.NORM_UNITS), int(RowInt.WHEN_ROW)
_SELECT, _TOPK = int(RowInt.SELECT), int(RowInt.TOPK)
_ROWS, _DROP, _LIMIT = int(SlotInt.ROWS), int(SlotInt.DROP_SELECT), int(SlotFloat.DOSE_LIMIT)
_IDENTITY, _TANH, _JUMP, _GATED, _TOPK_ACT = (
    int(a) for a in (Act.IDENTITY, Act.TANH_RELU, Act.JUMPRELU, Act.GATED, Act.TOPK)
)
_NO_NORM, _LAYER_NORM, _RESCALE = int(Norm.NONE), int(Norm.LAYER_NORM), int(Norm.NORM_RESCALE)
_TOUCHED, _OVER, _BROKEN = int(Flag.TOUCHED), int(Flag.OVER_DOSE), int(Flag.NON_FINITE)


def _remembers() -> bool:
    """Whether there is a folder for what was compiled; without one, each process compiles anew."""
    try:
        numba.njit(cache=True)(_remembers)
    except RuntimeError:
        return False
    return True


# Sums may be taken in any order, which is what lets them use vectors; NaN and infinity keep their meaning.
compiling: dict[str, Any] = {
    "cache": _remembers(),
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract"},
}


@numba.njit([float32(float32[::1], float32[::1])], **compiling)
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@numba.njit([void(float32[::1], float32, float32[::1])], **compiling)
def _add(total: Any, factor: Any, values: Any) -> None:
    for i in range(total.size):
        total[i] += factor * values[i]


@numba.njit([float64(float32[::1])], **compiling)
def _length(a: Any) -> Any:
    total = 0.0
    for i in range(a.size):
        total += np.float64(a[i]) * np.float64(a[i])
    return math.sqrt(total)


@numba.njit(**compiling)
def _moments(x: Any) -> Any:
    """Mean and unbiased standard deviation."""
    mean = 0.0
    for i in range(x.size):
        mean += np.float64(x[i])
    mean /= x.size
    spread = 0.0
    for i in range(x.size):
        spread += (np.float64(x[i]) - mean) ** 2
    return mean, math.sqrt(spread / (x.size - 1))


@numba.njit(**compiling)
def _gain(f: Any, width: Any, values: Any) -> Any:
    if f == 0 or not width > 0 or not math.isfinite(f):
        return 1.0
    last = values.size - 1
    place = min(max(abs(f) / width - 0.5, 0.0), np.float64(last))
    low = int(place)
    high = min(low + 1, last)
    return values[low] + (values[high] - values[low]) * (place - low)


@numba.njit(**compiling)
def activation(pre: Any, floats: Any, ints: Any, rank: Any) -> Any:
    """Of a pre-activation, with the scalars of its feature and the number of features above it."""
    act = ints[_ACT]
    if act == _IDENTITY:
        return pre
    if act == _GATED:
        if pre <= 0:
            return np.float32(0)
        return max(floats[_MAG_SCALE] * (pre - floats[_BIAS]) + floats[_MAG_BIAS], np.float32(0))
    f = np.float32(0) if pre <= 0 else pre  # NaN stays NaN
    if act == _TANH:
        return np.float32(math.tanh(f))
    if (act == _JUMP and pre <= floats[_THETA]) or (act == _TOPK_ACT and rank >= ints[_TOPK]):
        return np.float32(0)
    return f


@numba.njit(**compiling)
def _edited(f: Any, floats: Any, ints: Any, gain: Any, length: Any) -> Any:
    unit = length if ints[_UNITS] != 0 else 1.0
    low, high = floats[_LO], floats[_HI]
    new = floats[_SCALE] * f + floats[_SHIFT] * unit
    # An infinite bound is no bound, also for a token of length zero, where inf * 0 would be NaN.
    if not math.isinf(low) and new < low * unit:
        new = low * unit
    if not math.isinf(high) and new > high * unit:
        new = high * unit
    side, width = (1, floats[_WIDTH_NEG]) if f < 0 else (0, floats[_WIDTH_POS])
    if width > 0:
        new *= _gain(f, width, gain[side]) ** floats[_GAMMA]
    if floats[_MASK_LO] <= f <= floats[_MASK_HI]:
        new = 0.0
    return np.float32(new)


@numba.njit(
    [
        void(
            float32[:, ::1], int32[::1], int32[::1],
            float32[:, :, ::1], float32[:, :, ::1], uint16[:, :, ::1], float32[:, :, ::1], int32[:, :, ::1],
            float32[:, ::1], int32[:, ::1], float32[:, :, :, ::1],
            float32[:, ::1], float32[:, ::1], float32[::1], int32[::1],
            float32[:, ::1], float32[:, ::1], float32[:, ::1], int32[:, ::1], float32,
        )
    ],
    **compiling,
)  # fmt: skip
def _edit(
    y: Any, slots: Any, bits: Any,
    enc: Any, dec: Any, narrow_dec: Any, row_float: Any, row_int: Any,
    slot_float: Any, slot_int: Any, gain: Any,
    before: Any, after: Any, dose: Any, flags: Any,
    read: Any, residual: Any, base: Any, rank: Any, overflows: Any,
) -> None:  # fmt: skip
    """The whole step; an array of no rows stands for one that is not there."""
    x = np.empty(enc.shape[2], np.float32)
    delta = np.empty(y.shape[1], np.float32)
    decoder = np.empty(y.shape[1], np.float32)
    for t in range(y.shape[0]):
        dose[t] = 0
        flags[t] = 0
        s = slots[t]
        if s == 0:
            continue
        x[:] = read[t] if read.shape[0] else y[t]
        if residual.shape[0]:
            _add(x, np.float32(1), residual[t])
        length = _length(x)
        mean, std = 0.0, 1.0
        rows = slot_int[s, _ROWS]
        for r in range(rows):
            if row_int[s, r, _NORM] != _NO_NORM:
                mean, std = _moments(x)
                break
        root = math.sqrt(x.size)
        for r in range(rows):
            floats, ints = row_float[s, r], row_int[s, r]
            pre = np.float64(_dot(x, enc[s, r]))
            norm = ints[_NORM]
            if norm == _RESCALE:
                pre *= root / length
            elif norm != _NO_NORM:
                pre -= mean * floats[_ENC_SUM]
                if norm == _LAYER_NORM:
                    pre /= std + LAYER_NORM_EPS
            ranked = rank[t, r] if rank.shape[0] else 0
            before[t, r] = activation(np.float32(pre + floats[_BIAS]), floats, ints, ranked)
        delta[:] = 0
        touched = False
        for r in range(rows):
            floats, ints, f = row_float[s, r], row_int[s, r], before[t, r]
            after[t, r] = f
            if not bits[t] & ints[_SELECT]:
                continue
            touched = True
            gate = ints[_GATE]
            if gate >= 0 and not floats[_ABOVE] < before[t, gate] < floats[_BELOW]:
                continue
            after[t, r] = _edited(f, floats, ints, gain[s, r], length)
            change = np.float64(after[t, r]) - f
            if ints[_NORM] == _LAYER_NORM:
                change *= std
            elif ints[_NORM] == _RESCALE:
                change *= length / root
            if narrow_dec.shape[0]:
                # A bfloat16 is the upper half of a float32.
                decoder[:] = (narrow_dec[s, r].astype(np.uint32) << np.uint32(16)).view(np.float32)
                _add(delta, np.float32(change), decoder)
            else:
                _add(delta, np.float32(change), dec[s, r])
        if base.shape[0] and bits[t] & slot_int[s, _DROP]:
            touched = True
            _add(delta, np.float32(1), base[t])
        if not touched:
            continue
        flags[t] |= _TOUCHED
        size = _length(delta)
        if size != 0:
            dose[t] = size / length
            limit = slot_float[s, _LIMIT]
            if size / length > limit:
                flags[t] |= _OVER
                delta *= np.float32(limit * length / size)
        _add(delta, np.float32(1), y[t])
        broken = np.int32(0)  # counted, since a sum uses vectors and an early end does not
        for i in range(delta.size):
            broken += np.int32(0) if abs(delta[i]) < overflows else np.int32(1)
        if broken:
            flags[t] |= _BROKEN
        else:
            y[t] = delta


_ABSENT = np.zeros((0, 0), np.float32)
_ABSENT_INT = np.zeros((0, 0), np.int32)
_ABSENT_ROWS = np.zeros((0, 0, 0), np.float32)
_ABSENT_NARROW = np.zeros((0, 0, 0), np.uint16)


def _array(values: Tensor | None) -> NDArray[np.float32]:
    return _ABSENT if values is None else values.float().contiguous().numpy()


class FewEdits:
    """The edits of one table in steps of few tokens, with all that is the same in each of them looked up before.

    In the middle of a model, whose weights have gone through the caches, the way to a small edit takes several times
    as long as the edit.

    Args:
        slots: ``[>= T]`` int32, read anew in each step, as are the others.
        bits: ``[>= T]`` int32.
        enc: Of the table, as its other parts.
        dec: Of the table.
        scalars: Of the table: ``row_float``, ``row_int``, ``slot_float``, ``slot_int`` and ``gain``.
        outputs: ``before``, ``after``, ``dose`` and ``flags``, ``[>= T, ...]``.

    Raises:
        KeyError: The table's dtype cannot be edited here.
    """

    def __init__(
        self,
        slots: Tensor,
        bits: Tensor,
        enc: Tensor,
        dec: Tensor,
        scalars: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        self._dtype = dec.dtype
        self._overflows = _OVERFLOWS[dec.dtype]
        narrow = dec.dtype == torch.bfloat16
        decoders = (_ABSENT_ROWS, dec.view(torch.uint16).numpy()) if narrow else (dec.numpy(), _ABSENT_NARROW)
        self._fixed = [t.numpy() for t in (slots, bits, enc)]
        self._fixed += [*decoders, *(t.numpy() for t in (*scalars, *outputs))]

    def takes(self, y: Tensor) -> bool:
        """Whether a step's edits can be done here."""
        return y.shape[0] <= FEW and y.dtype == self._dtype

    def edit(
        self, y: Tensor, read: Tensor | None, residual: Tensor | None, base: Tensor | None, rank: Tensor | None
    ) -> None:
        """Edits ``y [T, D_out]`` in place; arguments as in :func:`sae_steer_kernels.feature_edit.feature_edit`."""
        work = y if y.dtype == torch.float32 and y.is_contiguous() else y.float().contiguous()
        given = (_array(read), _array(residual), _array(base), _ABSENT_INT if rank is None else rank.numpy())
        arguments: list[Any] = [work.numpy(), *self._fixed, *given, self._overflows]
        _edit(*arguments)
        if work is not y:
            y.copy_(work)

    __call__ = traced(f"{NAMESPACE}::feature_edit")(edit)


def feature_edit_numba(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    enc: Tensor,
    dec: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    slot_float: Tensor,
    slot_int: Tensor,
    gain: Tensor,
    before: Tensor,
    after: Tensor,
    dose: Tensor,
    flags: Tensor,
    read: Tensor | None,
    residual: Tensor | None,
    base: Tensor | None,
    rank: Tensor | None,
    scratch: Tensor | None = None,
    order: Tensor | None = None,
    tiles: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """Edits ``y`` in place; arguments as in :func:`sae_steer_kernels.feature_edit.feature_edit`.

    Tokens are edited one by one here, so that it is invariant of the batch as it is.
    """
    scalars, outputs = (row_float, row_int, slot_float, slot_int, gain), (before, after, dose, flags)
    if dec.dtype in _OVERFLOWS and (batch_invariant or y.shape[0] <= FEW) and y.dtype == dec.dtype:
        FewEdits(slots, bits, enc, dec, scalars, outputs).edit(y, read, residual, base, rank)
        return
    call = (y, slots, bits, enc, dec, *scalars, *outputs, read, residual, base, rank)
    edit_by_torch(*call, scratch, order, tiles, batch_invariant)
