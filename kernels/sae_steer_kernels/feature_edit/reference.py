"""The definition of ``feature_edit``: one token, one feature at a time, in float64. Slow, and meant to be read."""

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


def gain_at(f: float, table: Tensor, width_pos: float, width_neg: float) -> float:
    """Gain ``G(f)``: 1 on the atom f = 0 and on a side without a table, else linear between bin centres.

    Args:
        f: Activation.
        table: ``[2, B]`` gains at the centres ``(b + 1/2) * width``; row 0 for f > 0, row 1 for f < 0.
        width_pos: Bin width for f > 0; 0 = no table.
        width_neg: Bin width for f < 0; 0 = no table.
    """
    side, width = (0, width_pos) if f > 0 else (1, width_neg)
    if f == 0 or width == 0:
        return 1.0
    last = table.shape[1] - 1
    place = min(max(abs(f) / width - 0.5, 0.0), float(last))
    below = min(math.floor(place), last)
    above = min(below + 1, last)
    share = place - below
    return float(table[side, below]) * (1 - share) + float(table[side, above]) * share


def activation(pre: float, act: int, row: Tensor, rank: int, topk: int) -> float:
    """Activation ``f`` of one feature from its pre-activation; ``row`` is ``[len(RowFloat)]``."""
    positive = max(pre, 0.0)
    match Act(act):
        case Act.IDENTITY:
            return pre
        case Act.RELU:
            return positive
        case Act.TANH_RELU:
            return math.tanh(positive)
        case Act.JUMPRELU:
            return positive if pre > float(row[RowFloat.THETA]) else 0.0
        case Act.GATED:
            dot = pre - float(row[RowFloat.BIAS])
            return max(float(row[RowFloat.MAG_SCALE]) * dot + float(row[RowFloat.MAG_BIAS]), 0.0) if pre > 0 else 0.0
        case Act.TOPK:
            return positive if rank < topk else 0.0


def edited(f: float, row: Tensor, unit: float, gain: float) -> float:
    """``f' = clip(a f + c, lo, hi) * G(f)^gamma``, and 0 inside the masked range; ``unit`` multiplies c, lo and hi."""
    if float(row[RowFloat.MASK_LO]) <= f <= float(row[RowFloat.MASK_HI]):
        return 0.0
    lo, hi = (
        bound if math.isinf(bound) else bound * unit for bound in (float(row[RowFloat.LO]), float(row[RowFloat.HI]))
    )
    affine = float(row[RowFloat.SCALE]) * f + float(row[RowFloat.SHIFT]) * unit
    gamma = float(row[RowFloat.GAMMA])
    return min(max(affine, lo), hi) * (gain**gamma if gamma != 0 else 1.0)


def feature_edit_reference(
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
    read: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    rank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Edits one step's tokens. Arguments as in :func:`sae_steer_kernels.feature_edit.feature_edit`.

    Returns:
        ``y'`` [T, D_out], ``before`` [T, K], ``after`` [T, K], ``dose`` [T] in float64 and ``flags`` [T] int32.
    """
    tokens, rows = y.shape[0], enc.shape[1]
    out = y.double().clone()
    before, after = torch.zeros(tokens, rows, dtype=torch.float64), torch.zeros(tokens, rows, dtype=torch.float64)
    dose, flags = torch.zeros(tokens, dtype=torch.float64), torch.zeros(tokens, dtype=torch.int32)
    for t in range(tokens):
        s, token_bits = int(slots[t]), int(bits[t])
        if s == 0:
            continue
        x = (y if read is None else read)[t].double()
        if residual is not None:
            x = x + residual[t].double()
        width, norm_x = x.numel(), float(x.norm())
        used = int(slot_int[s, SlotInt.ROWS])
        written_scale = [1.0] * used
        for i in range(used):
            scalars = row_float[s, i].double()
            dot = float(enc[s, i].double() @ x)
            match Norm(int(row_int[s, i, RowInt.NORM])):
                case Norm.NONE:
                    pre = dot
                case Norm.CENTER:
                    pre = dot - float(x.mean()) * float(scalars[RowFloat.ENC_SUM])
                case Norm.LAYER_NORM:
                    std = float(x.std(unbiased=True))
                    pre = (dot - float(x.mean()) * float(scalars[RowFloat.ENC_SUM])) / (std + LAYER_NORM_EPS)
                    written_scale[i] = std
                case Norm.NORM_RESCALE:
                    pre = dot * math.sqrt(width) / norm_x
                    written_scale[i] = norm_x / math.sqrt(width)
            pre += float(scalars[RowFloat.BIAS])
            place = 0 if rank is None else int(rank[t, i])
            k = int(row_int[s, i, RowInt.TOPK])
            before[t, i] = after[t, i] = activation(pre, int(row_int[s, i, RowInt.ACT]), scalars, place, k)

        delta = torch.zeros(out.shape[1], dtype=torch.float64)
        for i in range(used):
            if token_bits & int(row_int[s, i, RowInt.SELECT]) == 0:
                continue
            flags[t] |= Flag.TOUCHED
            scalars = row_float[s, i].double()
            gate = int(row_int[s, i, RowInt.WHEN_ROW])
            above, below = float(scalars[RowFloat.WHEN_ABOVE]), float(scalars[RowFloat.WHEN_BELOW])
            if gate >= 0 and not above < float(before[t, gate]) < below:
                continue
            f = float(before[t, i])
            unit = norm_x if int(row_int[s, i, RowInt.NORM_UNITS]) else 1.0
            widths = float(scalars[RowFloat.GAIN_WIDTH_POS]), float(scalars[RowFloat.GAIN_WIDTH_NEG])
            after[t, i] = edited(f, scalars, unit, gain_at(f, gain[s, i], *widths))
            delta += (float(after[t, i]) - f) * written_scale[i] * dec[s, i].double()
        if base is not None and token_bits & int(slot_int[s, SlotInt.DROP_SELECT]):
            flags[t] |= Flag.TOUCHED
            delta += base[t].double()

        size = float(delta.norm())
        dose[t] = size / norm_x if norm_x > 0 else (0.0 if size == 0 else math.inf)
        limit = float(slot_float[s, SlotFloat.DOSE_LIMIT])
        if float(dose[t]) > limit:
            flags[t] |= Flag.OVER_DOSE
            delta *= limit * norm_x / size
        # Finite in the dtype that is written, not only in float64: 70000 is not a float16.
        if bool(torch.isfinite((out[t] + delta).to(y.dtype)).all()):
            out[t] += delta
        else:
            flags[t] |= Flag.NON_FINITE
    return out, before, after, dose, flags
