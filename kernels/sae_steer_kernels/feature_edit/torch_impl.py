"""``feature_edit`` in plain torch, grouped by slot: the implementation for CPUs, and the fallback elsewhere.

A slot's rows are read once for all of its tokens, so the work is two small matrix products per slot in the step.
"""

import math

import torch
from torch import Tensor

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


def preactivations(x: Tensor, enc: Tensor, row_float: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations of a slot's rows and the scale of what each row writes back.

    Args:
        x: ``[t, D]`` float32 tokens.
        enc: ``[k, D]`` float32 encoder rows.
        row_float: ``[k, len(RowFloat)]``.
        norm: ``[k]`` int32, a :class:`Norm` each.

    Returns:
        ``[t, k]`` pre-activations with the bias, and ``[t, k]`` write-back scales, both float32.
    """
    pre = x @ enc.T
    scale = torch.ones_like(pre)
    if bool((norm != Norm.NONE).any()):
        length = x.norm(dim=1, keepdim=True)
        std = x.std(dim=1, unbiased=True, keepdim=True)
        centred = pre - x.mean(dim=1, keepdim=True) * row_float[:, RowFloat.ENC_SUM]
        root = math.sqrt(x.shape[1])
        pre = torch.where(norm == Norm.CENTER, centred, pre)
        pre = torch.where(norm == Norm.LAYER_NORM, centred / (std + LAYER_NORM_EPS), pre)
        pre = torch.where(norm == Norm.NORM_RESCALE, pre * (root / length), pre)
        scale = torch.where(norm == Norm.LAYER_NORM, std, scale)
        scale = torch.where(norm == Norm.NORM_RESCALE, length / root, scale)
    return pre + row_float[:, RowFloat.BIAS], scale


def activations(pre: Tensor, row_float: Tensor, row_int: Tensor, rank: Tensor | None) -> Tensor:
    """Activations ``[t, k]`` from pre-activations ``[t, k]``; ``rank [t, k]`` is needed where a row is TopK."""
    act = row_int[:, RowInt.ACT]
    positive = pre.clamp_min(0)
    f = torch.where(act == Act.IDENTITY, pre, positive)
    f = torch.where((act == Act.JUMPRELU) & (pre <= row_float[:, RowFloat.THETA]), 0, f)
    if bool((act == Act.TANH_RELU).any()):
        f = torch.where(act == Act.TANH_RELU, positive.tanh(), f)
    if bool((act == Act.GATED).any()):
        dot = pre - row_float[:, RowFloat.BIAS]
        magnitude = (row_float[:, RowFloat.MAG_SCALE] * dot + row_float[:, RowFloat.MAG_BIAS]).clamp_min(0)
        f = torch.where(act == Act.GATED, magnitude * (pre > 0), f)
    if rank is not None:
        f = torch.where((act == Act.TOPK) & (rank >= row_int[:, RowInt.TOPK]), 0, f)
    return f


def gains(f: Tensor, table: Tensor, row_float: Tensor) -> Tensor:
    """Gain ``G(f)`` of each activation, ``f [t, k]``, ``table [k, 2, B]``; 1 at f = 0 and where there is no table."""
    widths = row_float[:, [RowFloat.GAIN_WIDTH_POS, RowFloat.GAIN_WIDTH_NEG]]
    if not bool((widths > 0).any()):
        return torch.ones_like(f)
    side = (f < 0).long()
    rows = torch.arange(f.shape[1], device=f.device).expand_as(f)
    width = widths[rows, side]
    has_table = (f != 0) & (width > 0)
    last = table.shape[2] - 1
    place = (f.abs() / torch.where(has_table, width, 1) - 0.5).clamp(0, last)
    low = place.floor().long()
    high = (low + 1).clamp_max(last)
    return torch.where(has_table, torch.lerp(table[rows, side, low], table[rows, side, high], place - low), 1)


def edited(f: Tensor, row_float: Tensor, row_int: Tensor, table: Tensor, length: Tensor) -> Tensor:
    """``f'`` of every row on every token, whether or not its selector and gate hold; ``length [t, 1]`` is ``|x|``."""
    unit = torch.where(row_int[:, RowInt.NORM_UNITS] != 0, length, 1)
    # An infinite bound is no bound, also for a token of length zero, where inf * 0 would be NaN.
    lo, hi = row_float[:, RowFloat.LO], row_float[:, RowFloat.HI]
    lo, hi = torch.where(lo.isinf(), lo, lo * unit), torch.where(hi.isinf(), hi, hi * unit)
    affine = row_float[:, RowFloat.SCALE] * f + row_float[:, RowFloat.SHIFT] * unit
    new = affine.maximum(lo).minimum(hi) * gains(f, table, row_float) ** row_float[:, RowFloat.GAMMA]
    masked = (f >= row_float[:, RowFloat.MASK_LO]) & (f <= row_float[:, RowFloat.MASK_HI])
    return torch.where(masked, 0, new)


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
    for s in torch.unique(slots).tolist():
        if s == 0:
            continue
        tokens = (slots == s).nonzero().squeeze(1)
        used = int(slot_int[s, SlotInt.ROWS])
        floats, ints = row_float[s, :used], row_int[s, :used]
        x = (y if read is None else read)[tokens].float()
        if residual is not None:
            x = x + residual[tokens].float()
        length = x.norm(dim=1, keepdim=True)

        pre, scale = preactivations(x, enc[s, :used], floats, ints[:, RowInt.NORM])
        f = activations(pre, floats, ints, None if rank is None else rank[tokens, :used])
        token_bits = bits[tokens, None]
        selected = (token_bits & ints[:, RowInt.SELECT]) != 0
        touched = selected.any(dim=1)
        gate = ints[:, RowInt.WHEN_ROW].long()
        gate_f = f[:, gate.clamp_min(0)]
        holds = (gate_f > floats[:, RowFloat.WHEN_ABOVE]) & (gate_f < floats[:, RowFloat.WHEN_BELOW])
        new = torch.where(selected & (holds | (gate < 0)), edited(f, floats, ints, gain[s, :used], length), f)

        delta = ((new - f) * scale) @ dec[s, :used].float()
        drop = (token_bits & slot_int[s, SlotInt.DROP_SELECT]) != 0
        if base is not None and bool(drop.any()):
            delta = delta + torch.where(drop, base[tokens].float(), 0)
            touched = touched | drop.squeeze(1)
        size = delta.norm(dim=1, keepdim=True)
        token_dose = torch.where(size == 0, 0, size / length)
        limit = slot_float[s, SlotFloat.DOSE_LIMIT]
        over = token_dose > limit
        delta = torch.where(over, delta * (limit * length / size), delta)

        old = y[tokens]
        result = (old.float() + delta).to(y.dtype)
        finite = result.isfinite().all(dim=1, keepdim=True)
        y[tokens] = torch.where(finite, result, old)
        before[tokens, :used] = f
        after[tokens, :used] = new
        dose[tokens] = token_dose.squeeze(1)
        flags[tokens] = (
            touched * int(Flag.TOUCHED)
            + over.squeeze(1) * int(Flag.OVER_DOSE)
            + ~finite.squeeze(1) * int(Flag.NON_FINITE)
        ).to(flags.dtype)
