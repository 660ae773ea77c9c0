"""``feature_edit`` in plain torch: the implementation for CPUs, and the fallback elsewhere.

A few tokens (a decode step) are edited in one go, each with rows gathered from its own slot: the cost of a step does
not grow with the number of different programs. Many tokens (a prefill) are grouped by slot, whose rows are then read
once for all of its tokens.
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
        enc: ``[k, D]`` float32 encoder rows, or ``[t, k, D]``: each token's own.
        row_float: ``[k, len(RowFloat)]``, or each token's own.
        norm: ``[k]`` int32, a :class:`Norm` each, or each token's own.

    Returns:
        ``[t, k]`` pre-activations with the bias, and ``[t, k]`` write-back scales, both float32.
    """
    pre = x @ enc.T if enc.ndim == 2 else torch.bmm(enc, x[:, :, None]).squeeze(2)
    scale = torch.ones_like(pre)
    if bool((norm != Norm.NONE).any()):
        length = x.norm(dim=1, keepdim=True)
        std = x.std(dim=1, unbiased=True, keepdim=True)
        centred = pre - x.mean(dim=1, keepdim=True) * row_float[..., RowFloat.ENC_SUM]
        root = math.sqrt(x.shape[1])
        pre = torch.where(norm == Norm.CENTER, centred, pre)
        pre = torch.where(norm == Norm.LAYER_NORM, centred / (std + LAYER_NORM_EPS), pre)
        pre = torch.where(norm == Norm.NORM_RESCALE, pre * (root / length), pre)
        scale = torch.where(norm == Norm.LAYER_NORM, std, scale)
        scale = torch.where(norm == Norm.NORM_RESCALE, length / root, scale)
    return pre + row_float[..., RowFloat.BIAS], scale


def activations(pre: Tensor, row_float: Tensor, row_int: Tensor, rank: Tensor | None) -> Tensor:
    """Activations ``[t, k]`` from pre-activations ``[t, k]``; ``rank [t, k]`` is needed where a row is TopK.

    The scalars are those of :func:`preactivations`: of one slot, or each token's own. So they are below.
    """
    act = row_int[..., RowInt.ACT]
    positive = pre.clamp_min(0)
    f = torch.where(act == Act.IDENTITY, pre, positive)
    f = torch.where((act == Act.JUMPRELU) & (pre <= row_float[..., RowFloat.THETA]), 0, f)
    if bool((act == Act.TANH_RELU).any()):
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
    if not bool((widths > 0).any()):
        return torch.ones_like(f)
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


def edited(f: Tensor, row_float: Tensor, row_int: Tensor, table: Tensor, length: Tensor) -> Tensor:
    """``f'`` of every row on every token, whether or not its selector and gate hold; ``length [t, 1]`` is ``|x|``."""
    unit = torch.where(row_int[..., RowInt.NORM_UNITS] != 0, length, 1)
    # An infinite bound is no bound, also for a token of length zero, where inf * 0 would be NaN.
    lo, hi = row_float[..., RowFloat.LO], row_float[..., RowFloat.HI]
    lo, hi = torch.where(lo.isinf(), lo, lo * unit), torch.where(hi.isinf(), hi, hi * unit)
    affine = row_float[..., RowFloat.SCALE] * f + row_float[..., RowFloat.SHIFT] * unit
    new = affine.maximum(lo).minimum(hi) * gains(f, table, row_float) ** row_float[..., RowFloat.GAMMA]
    masked = (f >= row_float[..., RowFloat.MASK_LO]) & (f <= row_float[..., RowFloat.MASK_HI])
    return torch.where(masked, 0, new)


# Edited tokens are edited in one go where their gathered encoder rows have at most so many elements.
GATHERED = 2**22


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
    edited_tokens = slots.nonzero().squeeze(1)
    own = slots[edited_tokens]
    groups: list[tuple[Tensor, Tensor | int, int]] = []
    most = int(slot_int[own, SlotInt.ROWS].max()) if own.numel() else 0
    if 0 < own.numel() * most * enc.shape[2] <= GATHERED:
        groups.append((edited_tokens, own, most))
    elif most:
        for s in torch.unique(own).tolist():
            groups.append((edited_tokens[own == s], s, int(slot_int[s, SlotInt.ROWS])))
    for tokens, s, used in groups:
        floats, ints, table = row_float[s, :used], row_int[s, :used], gain[s, :used]
        limit, drop_select = slot_float[s, SlotFloat.DOSE_LIMIT], slot_int[s, SlotInt.DROP_SELECT]
        x = (y if read is None else read)[tokens].float()
        if residual is not None:
            x = x + residual[tokens].float()
        length = x.norm(dim=1, keepdim=True)

        pre, scale = preactivations(x, enc[s, :used], floats, ints[..., RowInt.NORM])
        f = activations(pre, floats, ints, None if rank is None else rank[tokens, :used])
        token_bits = bits[tokens]
        # Beyond the rows that its slot has in use, a token's rows may be those of an earlier program.
        inside = torch.arange(used, device=y.device) < slot_int[s, SlotInt.ROWS][..., None]
        selected = ((token_bits[:, None] & ints[..., RowInt.SELECT]) != 0) & inside
        touched = selected.any(dim=1)
        gate = ints[..., RowInt.WHEN_ROW].long().expand_as(f)
        gate_f = f.gather(1, gate.clamp_min(0))
        holds = (gate_f > floats[..., RowFloat.WHEN_ABOVE]) & (gate_f < floats[..., RowFloat.WHEN_BELOW])
        new = torch.where(selected & (holds | (gate < 0)), edited(f, floats, ints, table, length), f)

        change, rows = torch.where(selected, (new - f) * scale, 0), dec[s, :used].float()
        delta = change @ rows if rows.ndim == 2 else torch.bmm(change[:, None], rows).squeeze(1)
        drop = (token_bits & drop_select) != 0
        if base is not None and bool(drop.any()):
            delta = delta + torch.where(drop[:, None], base[tokens].float(), 0)
            touched = touched | drop
        size = delta.norm(dim=1)
        reach = length.squeeze(1)
        token_dose = torch.where(size == 0, 0, size / reach)
        over = token_dose > limit
        delta = torch.where(over[:, None], delta * (limit * reach / size)[:, None], delta)

        old = y[tokens]
        result = (old.float() + delta).to(y.dtype)
        finite = result.isfinite().all(dim=1)
        y[tokens] = torch.where(finite[:, None], result, old)
        before[tokens, :used] = f
        after[tokens, :used] = new
        dose[tokens] = token_dose
        flags[tokens] = (touched * int(Flag.TOUCHED) + over * int(Flag.OVER_DOSE) + ~finite * int(Flag.NON_FINITE)).to(
            flags.dtype
        )
