"""``feature_edit`` in plain torch: the implementation for CPUs, and the fallback elsewhere.

A few tokens (a decode step) are edited in one go, each with rows gathered from its own slot: the cost of a step does
not grow with the number of different programs. Many tokens (a prefill) are grouped by slot, whose rows are then read
once for all of its tokens.
"""

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import (
    LAYER_NORM_EPS,
    Act,
    Flag,
    Norm,
    RowFloat,
    RowInt,
    Skip,
    SlotFloat,
    SlotInt,
)

# As plain numbers: a member of an enumeration costs as much to look up as a small tensor operation.
_NOTHING = 0
_NORM, _ACTIVATION, _GAIN, _MASK = int(Skip.NORM), int(Skip.ACTIVATION), int(Skip.GAIN), int(Skip.MASK)
_BOUNDS, _UNITS, _GATE, _LIMIT = int(Skip.BOUNDS), int(Skip.UNITS), int(Skip.GATE), int(Skip.LIMIT)
_IDENTITY, _JUMPRELU = int(Act.IDENTITY), int(Act.JUMPRELU)
_BIAS, _THETA, _SCALE, _SHIFT = (int(c) for c in (RowFloat.BIAS, RowFloat.THETA, RowFloat.SCALE, RowFloat.SHIFT))
_ACT, _NORM_OF, _SELECT = int(RowInt.ACT), int(RowInt.NORM), int(RowInt.SELECT)
_ROWS, _SKIPS = int(SlotInt.ROWS), int(SlotInt.SKIPS)
_DOSE_LIMIT, _DROP_SELECT = int(SlotFloat.DOSE_LIMIT), int(SlotInt.DROP_SELECT)
_MARKS = torch.tensor([int(Flag.TOUCHED), int(Flag.OVER_DOSE), int(Flag.NON_FINITE)], dtype=torch.int32)


def preactivations(
    x: Tensor, enc: Tensor, row_float: Tensor, norm: Tensor, skip: int = _NOTHING
) -> tuple[Tensor, Tensor | None]:
    """Pre-activations of a slot's rows and the scale of what each row writes back.

    Args:
        x: ``[t, D]`` float32 tokens.
        enc: ``[k, D]`` float32 encoder rows, or ``[t, k, D]``: each token's own.
        row_float: ``[k, len(RowFloat)]``, or each token's own.
        norm: ``[k]`` int32, a :class:`Norm` each, or each token's own.
        skip: A :class:`Skip`.

    Returns:
        ``[t, k]`` pre-activations with the bias, and ``[t, k]`` write-back scales (None = 1), both float32.
    """
    pre = x @ enc.T if enc.ndim == 2 else torch.bmm(enc, x[:, :, None]).squeeze(2)
    scale = None
    if not skip & _NORM and bool((norm != Norm.NONE).any()):
        length = x.norm(dim=1, keepdim=True)
        std = x.std(dim=1, unbiased=True, keepdim=True)
        centred = pre - x.mean(dim=1, keepdim=True) * row_float[..., RowFloat.ENC_SUM]
        root = math.sqrt(x.shape[1])
        pre = torch.where(norm == Norm.CENTER, centred, pre)
        pre = torch.where(norm == Norm.LAYER_NORM, centred / (std + LAYER_NORM_EPS), pre)
        pre = torch.where(norm == Norm.NORM_RESCALE, pre * (root / length), pre)
        scale = torch.where(norm == Norm.LAYER_NORM, std, 1)
        scale = torch.where(norm == Norm.NORM_RESCALE, length / root, scale)
    return pre + row_float[..., _BIAS], scale


def activations(pre: Tensor, row_float: Tensor, row_int: Tensor, rank: Tensor | None, skip: int = _NOTHING) -> Tensor:
    """Activations ``[t, k]`` from pre-activations ``[t, k]``; ``rank [t, k]`` is needed where a row is TopK.

    The scalars are those of :func:`preactivations`: of one slot, or each token's own. So they are below.
    """
    act = row_int[..., _ACT]
    positive = pre.clamp_min(0)
    f = torch.where((act == _JUMPRELU) & (pre <= row_float[..., _THETA]), 0, positive)
    f = torch.where(act == _IDENTITY, pre, f)
    if skip & _ACTIVATION:
        return f
    f = torch.where(act == Act.TANH_RELU, positive.tanh(), f)
    if bool((act == Act.GATED).any()):
        dot = pre - row_float[..., RowFloat.BIAS]
        magnitude = (row_float[..., RowFloat.MAG_SCALE] * dot + row_float[..., RowFloat.MAG_BIAS]).clamp_min(0)
        f = torch.where(act == Act.GATED, magnitude * (pre > 0), f)
    if rank is not None:
        f = torch.where((act == Act.TOPK) & (rank >= row_int[..., RowInt.TOPK]), 0, f)
    return f


def gains(f: Tensor, table: Tensor, row_float: Tensor) -> Tensor:
    """Gain ``G(f)`` of each activation, ``f [t, k]``, ``table [k, 2, B]``; 1 at f = 0 and where there is no table."""
    widths = row_float[..., [RowFloat.GAIN_WIDTH_POS, RowFloat.GAIN_WIDTH_NEG]]
    side = (f < 0).long()[..., None]
    width = widths.expand(*f.shape, 2).gather(2, side).squeeze(2)
    values = table.expand(*f.shape, *table.shape[-2:]).gather(2, side[..., None].expand(*f.shape, 1, table.shape[-1]))[
        :, :, 0
    ]
    has_table = (f != 0) & (width > 0)
    last = table.shape[-1] - 1
    place = (f.abs() / torch.where(has_table, width, 1) - 0.5).clamp(0, last)[..., None]
    low = place.floor().long()
    high = (low + 1).clamp_max(last)
    between = torch.lerp(values.gather(2, low), values.gather(2, high), place - low)
    return torch.where(has_table, between.squeeze(2), 1)


def edited(
    f: Tensor, row_float: Tensor, row_int: Tensor, table: Tensor | None, length: Tensor, skip: int = _NOTHING
) -> Tensor:
    """``f'`` of every row on every token, whether or not its selector and gate hold; ``length [t, 1]`` is ``|x|``."""
    shift = row_float[..., _SHIFT]
    unit = None
    if not skip & _UNITS:
        unit = torch.where(row_int[..., RowInt.NORM_UNITS] != 0, length, 1)
        shift = shift * unit
    new = torch.addcmul(shift, row_float[..., _SCALE], f)
    if not skip & _BOUNDS:
        lo, hi = row_float[..., RowFloat.LO], row_float[..., RowFloat.HI]
        if unit is not None:
            # An infinite bound is no bound, also for a token of length zero, where inf * 0 would be NaN.
            lo, hi = torch.where(lo.isinf(), lo, lo * unit), torch.where(hi.isinf(), hi, hi * unit)
        new = new.maximum(lo).minimum(hi)
    if table is not None:
        new = new * gains(f, table, row_float) ** row_float[..., RowFloat.GAMMA]
    if not skip & _MASK:
        masked = (f >= row_float[..., RowFloat.MASK_LO]) & (f <= row_float[..., RowFloat.MASK_HI])
        new = torch.where(masked, 0, new)
    return new


@dataclass(frozen=True, slots=True)
class _Group:
    """Tokens that are edited in one go.

    Args:
        tokens: Their numbers; a slice where it is all of them.
        slot: The slot of all, or ``[t]`` each one's own.
        rows: The most rows of a slot.
        skip: What none of the slots asks for.
    """

    tokens: Tensor | slice
    slot: int | Tensor
    rows: int
    skip: int

    def of(self, table: Tensor) -> Tensor:
        """The rows in use of a table ``[S, K, ...]``: ``[k, ...]``, or each token's own."""
        used = table[:, : self.rows]
        return used[self.slot] if isinstance(self.slot, int) else used.index_select(0, self.slot)

    def of_slot(self, table: Tensor, column: int) -> Tensor:
        """One scalar of a table ``[S, n]``: ``[]``, or each token's own."""
        return table[self.slot, column]


# Edited tokens are edited in one go where their gathered encoder rows have at most so many elements.
GATHERED = 2**22


def _groups(slots: Tensor, slot_int: Tensor, width: int) -> list[_Group]:
    tokens = slots.nonzero().squeeze(1)
    if not tokens.numel():
        return []
    everything = tokens.numel() == slots.numel()
    own = slots if everything else slots[tokens]
    chosen: Tensor | slice = slice(None) if everything else tokens
    used: dict[int, tuple[int, int]] = {}
    for slot, scalars in zip(own.tolist(), slot_int[own].tolist(), strict=True):
        used[slot] = scalars[_ROWS], scalars[_SKIPS]
    if len(used) == 1:
        [(slot, (rows, skip))] = used.items()
        return [_Group(chosen, slot, rows, skip)]
    most = max(rows for rows, _ in used.values())
    if own.numel() * most * width <= GATHERED:
        shared = functools.reduce(operator.and_, (skip for _, skip in used.values()))
        return [_Group(chosen, own, most, shared)]
    return [_Group((slots == slot).nonzero().squeeze(1), slot, rows, skip) for slot, (rows, skip) in used.items()]


def feature_edit_torch(
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
) -> None:
    """Edits ``y`` in place; arguments as in :func:`sae_steer_kernels.feature_edit.feature_edit`."""
    dose.zero_()
    flags.zero_()
    for group in _groups(slots, slot_int, enc.shape[2]):
        tokens, used, skip = group.tokens, group.rows, group.skip
        floats, ints = group.of(row_float), group.of(row_int)
        x = (y if read is None else read)[tokens].float()
        if residual is not None:
            x = x + residual[tokens].float()
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)

        pre, scale = preactivations(x, group.of(enc), floats, ints[..., _NORM_OF], skip)
        f = activations(pre, floats, ints, None if rank is None else rank[tokens, :used], skip)
        token_bits = bits[tokens]
        selected = (token_bits[:, None] & ints[..., _SELECT]) != 0
        if not isinstance(group.slot, int):
            # Beyond the rows that its slot has in use, a token's rows may be those of an earlier program.
            rows = group.of_slot(slot_int, _ROWS)
            selected = selected & (torch.arange(used, device=y.device) < rows[:, None])
        holds = selected
        if not skip & _GATE:
            gate = ints[..., RowInt.WHEN_ROW].long().expand_as(f)
            gate_f = f.gather(1, gate.clamp_min(0))
            open_ = (gate_f > floats[..., RowFloat.WHEN_ABOVE]) & (gate_f < floats[..., RowFloat.WHEN_BELOW])
            holds = selected & (open_ | (gate < 0))
        table = None if skip & _GAIN else group.of(gain)
        new = torch.where(holds, edited(f, floats, ints, table, length, skip), f)

        change = torch.where(holds, new - f, 0)
        if scale is not None:
            change = torch.where(holds, change * scale, 0)
        decoder = group.of(dec).float()
        delta = change @ decoder if decoder.ndim == 2 else torch.bmm(change[:, None], decoder).squeeze(1)
        touched = selected.any(dim=1)
        if base is not None:
            drop = (token_bits & group.of_slot(slot_int, _DROP_SELECT)) != 0
            delta = delta + torch.where(drop[:, None], base[tokens].float(), 0)
            touched = touched | drop
        size = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        token_dose = torch.where(size == 0, 0, size / length)
        over = None
        if not skip & _LIMIT:
            limit = group.of_slot(slot_float, _DOSE_LIMIT).reshape(-1, 1)
            over = token_dose > limit
            delta = torch.where(over, delta * (limit * length / size), delta)

        old = y[tokens]
        result = (old.float() + delta).to(y.dtype)
        # The largest element says whether all are finite: NaN is not below infinity either.
        finite = torch.linalg.vector_norm(result, math.inf, dim=1, keepdim=True) < math.inf
        if not bool(finite.all()):
            result = torch.where(finite, result, old)
        y[tokens] = result
        before[tokens, :used] = f
        after[tokens, :used] = new
        dose[tokens] = token_dose.squeeze(1)
        marks = torch.cat([touched[:, None], torch.zeros_like(finite) if over is None else over, ~finite], dim=1)
        flags[tokens] = (marks * _MARKS.to(y.device)).sum(dim=1, dtype=torch.int32)


def edit_by_torch(*arguments: Any) -> None:
    """The implementation as the op calls it: without scratch and groups, and token by token where that is asked."""
    *call, _scratch, _order, _tiles, batch_invariant = arguments
    if not batch_invariant:
        feature_edit_torch(*call)
        return
    y, slots, bits, *rest = call
    tables, per_token = rest[:7], rest[7:]
    for t in range(y.shape[0]):
        own = [None if value is None else value[t : t + 1] for value in per_token]
        feature_edit_torch(y[t : t + 1], slots[t : t + 1], bits[t : t + 1], *tables, *own)
