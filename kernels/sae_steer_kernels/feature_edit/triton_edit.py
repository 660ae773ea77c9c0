"""Device functions of ``feature_edit``: from dot products to activations, and from those to what they become.

They take tensors of any shape that broadcasts with that of ``rows``: the row kernels hand in ``[BK]``, the grouped ones
``[BM, BK]``. All arithmetic is in float32. Comparisons are written so that a NaN stays one, as in the reference.
"""

# Triton's language is Python that only Triton understands: its functions take tensors, pointers and compile-time
# numbers alike, and neither checker can follow that. Only the files of device functions are excused.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from sae_steer_kernels.feature_edit.layout import LAYER_NORM_EPS, Act, Norm, RowFloat, RowInt, Skip

FLOATS = tl.constexpr(len(RowFloat))
INTS = tl.constexpr(len(RowInt))

_BIAS = tl.constexpr(int(RowFloat.BIAS))
_THETA = tl.constexpr(int(RowFloat.THETA))
_MAG_SCALE = tl.constexpr(int(RowFloat.MAG_SCALE))
_MAG_BIAS = tl.constexpr(int(RowFloat.MAG_BIAS))
_ENC_SUM = tl.constexpr(int(RowFloat.ENC_SUM))
_SCALE = tl.constexpr(int(RowFloat.SCALE))
_SHIFT = tl.constexpr(int(RowFloat.SHIFT))
_LO = tl.constexpr(int(RowFloat.LO))
_HI = tl.constexpr(int(RowFloat.HI))
_MASK_LO = tl.constexpr(int(RowFloat.MASK_LO))
_MASK_HI = tl.constexpr(int(RowFloat.MASK_HI))
_GAMMA = tl.constexpr(int(RowFloat.GAMMA))
_WIDTH_POS = tl.constexpr(int(RowFloat.GAIN_WIDTH_POS))
_WIDTH_NEG = tl.constexpr(int(RowFloat.GAIN_WIDTH_NEG))
_ACT = tl.constexpr(int(RowInt.ACT))
_NORM = tl.constexpr(int(RowInt.NORM))
_UNITS = tl.constexpr(int(RowInt.NORM_UNITS))
_TOPK_OF = tl.constexpr(int(RowInt.TOPK))

_IDENTITY = tl.constexpr(int(Act.IDENTITY))
_TANH_RELU = tl.constexpr(int(Act.TANH_RELU))
_JUMPRELU = tl.constexpr(int(Act.JUMPRELU))
_GATED = tl.constexpr(int(Act.GATED))
_TOPK = tl.constexpr(int(Act.TOPK))

_CENTER = tl.constexpr(int(Norm.CENTER))
_LAYER_NORM = tl.constexpr(int(Norm.LAYER_NORM))
_NORM_RESCALE = tl.constexpr(int(Norm.NORM_RESCALE))
_EPS = tl.constexpr(LAYER_NORM_EPS)

NO_NORM = tl.constexpr(int(Skip.NORM))
NO_ACTIVATION = tl.constexpr(int(Skip.ACTIVATION))
NO_GAIN = tl.constexpr(int(Skip.GAIN))


@triton.jit
def _tanh(p):
    """tanh of p >= 0; Triton has none of its own that the interpreter knows too."""
    # Below 0.3 the quotient would cancel; there the series' next term is under 2e-8.
    square = p * p
    series = p * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(p < 0.3, series, 1 - 2 / (tl.exp(2 * p) + 1))


@triton.jit
def activated(dot, length, mean, std, rank, floats, ints, mask, skips, ROOT: tl.constexpr):
    """Activations and write-back scales of rows.

    Args:
        dot: ``<enc, x>`` of each row.
        length: ``|x|``.
        mean: Mean of ``x``; may be anything where no row asks for it.
        std: Unbiased standard deviation of ``x``, likewise.
        rank: Rank of each row's pre-activation; 0 where nothing is ranked.
        floats: Pointers to the first of each row's float scalars.
        ints: Pointers to the first of each row's integer scalars.
        mask: Which rows there are.
        skips: The slot's :class:`~sae_steer_kernels.feature_edit.layout.Skip`.
        ROOT: ``sqrt(D)``.
    """
    scaled = dot
    written = tl.full(dot.shape, 1.0, tl.float32)
    if (skips & NO_NORM) == 0:
        norm = tl.load(ints + _NORM, mask=mask, other=0)
        centred = dot - mean * tl.load(floats + _ENC_SUM, mask=mask, other=0.0)
        scaled = tl.where(norm == _CENTER, centred, scaled)
        scaled = tl.where(norm == _LAYER_NORM, centred / (std + _EPS), scaled)
        scaled = tl.where(norm == _NORM_RESCALE, dot * (ROOT / length), scaled)
        written = tl.where(norm == _LAYER_NORM, std, written)
        written = tl.where(norm == _NORM_RESCALE, length / ROOT, written)
    pre = scaled + tl.load(floats + _BIAS, mask=mask, other=0.0)
    act = tl.load(ints + _ACT, mask=mask, other=_IDENTITY)
    positive = tl.where(pre < 0, 0.0, pre)
    f = tl.where(act == _IDENTITY, pre, positive)
    jumped = pre > tl.load(floats + _THETA, mask=mask, other=0.0)
    f = tl.where((act == _JUMPRELU) & (jumped == 0), 0.0, f)
    if (skips & NO_ACTIVATION) == 0:
        f = tl.where(act == _TANH_RELU, _tanh(positive), f)
        magnitude = scaled * tl.load(floats + _MAG_SCALE, mask=mask, other=1.0)
        magnitude += tl.load(floats + _MAG_BIAS, mask=mask, other=0.0)
        f = tl.where(act == _GATED, tl.where((pre > 0) & (magnitude > 0), magnitude, 0.0), f)
        among = rank < tl.load(ints + _TOPK_OF, mask=mask, other=0)
        f = tl.where((act == _TOPK) & (among == 0), 0.0, f)
    return f, written


@triton.jit
def _gain(f, floats, table, mask, B: tl.constexpr):
    """``G(f)^gamma``: 1 at f = 0 and on a side without a table, else linear between bin centres."""
    width_pos = tl.load(floats + _WIDTH_POS, mask=mask, other=0.0)
    width_neg = tl.load(floats + _WIDTH_NEG, mask=mask, other=0.0)
    width = tl.where(f > 0, width_pos, width_neg)
    has = mask & (f != 0) & (f == f) & (width > 0)
    place = tl.where(has, tl.abs(f) / tl.where(has, width, 1.0) - 0.5, 0.0)
    # The bounds are kept before the conversion: an infinite place has no integer.
    place = tl.minimum(tl.maximum(place, 0.0), B - 1.0)
    below = place.to(tl.int32)
    above = tl.minimum(below + 1, B - 1)
    share = place - below.to(tl.float32)
    side = table + tl.where(f > 0, 0, B)
    low = tl.load(side + below, mask=has, other=1.0)
    high = tl.load(side + above, mask=has, other=1.0)
    gain = low * (1 - share) + high * share
    gamma = tl.load(floats + _GAMMA, mask=mask, other=1.0)
    power = tl.where(gamma == 1, gain, tl.exp2(gamma * tl.log2(gain)))
    return tl.where(gamma == 0, 1.0, tl.where(has, power, 1.0))


@triton.jit
def edited(f, length, floats, ints, table, mask, skips, B: tl.constexpr):
    """``f'`` of rows, whether or not their selector and gate hold; ``table`` points to each row's ``[2, B]`` gains."""
    unit = tl.where(tl.load(ints + _UNITS, mask=mask, other=0) != 0, length, 1.0)
    lo = tl.load(floats + _LO, mask=mask, other=float("-inf"))
    hi = tl.load(floats + _HI, mask=mask, other=float("inf"))
    # An infinite bound is no bound, also for a token of length zero, where inf * 0 would be NaN.
    lo = tl.where(lo == float("-inf"), lo, lo * unit)
    hi = tl.where(hi == float("inf"), hi, hi * unit)
    new = f * tl.load(floats + _SCALE, mask=mask, other=1.0) + unit * tl.load(floats + _SHIFT, mask=mask, other=0.0)
    new = tl.where(new < lo, lo, new)
    new = tl.where(new > hi, hi, new)
    if (skips & NO_GAIN) == 0:
        new = new * _gain(f, floats, table, mask, B)
    mask_lo = tl.load(floats + _MASK_LO, mask=mask, other=float("inf"))
    mask_hi = tl.load(floats + _MASK_HI, mask=mask, other=float("-inf"))
    return tl.where((f >= mask_lo) & (f <= mask_hi), 0.0, new)
