"""How the packed tables of :mod:`sae_steer_kernels.feature_edit` are laid out.

Everything a feature's edit needs beside its two vectors is a handful of scalars. They are packed per row, so that one
feature's scalars are one cache line, and are addressed by the enumerations below.
"""

import enum


class Act(enum.IntEnum):
    """Activation of a row: how ``f`` follows from the pre-activation ``p``."""

    IDENTITY = 0  # f = p: a plain direction
    RELU = 1  # f = max(p, 0)
    TANH_RELU = 2  # f = tanh(max(p, 0))
    JUMPRELU = 3  # f = max(p, 0) where p > theta, else 0
    GATED = 4  # f = max(mag_scale * (p - bias) + mag_bias, 0) where p > 0, else 0
    TOPK = 5  # f = max(p, 0) where fewer than k pre-activations of the dictionary exceed p, else 0


class Norm(enum.IntEnum):
    """Normalisation ``N`` of the token before the row's dot product, and the scale ``s`` of what is written back."""

    NONE = 0  # N(x) = x, s = 1
    CENTER = 1  # N(x) = x - mean(x), s = 1
    LAYER_NORM = 2  # N(x) = (x - mean(x)) / (std(x) + 1e-5), s = std(x), with the unbiased std
    NORM_RESCALE = 3  # N(x) = x * sqrt(D) / |x|, s = |x| / sqrt(D)


class RowFloat(enum.IntEnum):
    """Columns of ``row_float [S, K, len(RowFloat)]``."""

    BIAS = 0  # b': the encoder bias with the decoder bias folded in
    THETA = 1  # JumpReLU threshold
    MAG_SCALE = 2  # gated: exp(r_mag)
    MAG_BIAS = 3  # gated: magnitude bias with the decoder bias folded in
    ENC_SUM = 4  # sum of the encoder row, for CENTER and LAYER_NORM
    SCALE = 5  # a of f' = clip(a f + c, lo, hi)
    SHIFT = 6  # c
    LO = 7
    HI = 8
    MASK_LO = 9  # f' = 0 where MASK_LO <= f <= MASK_HI
    MASK_HI = 10
    GAMMA = 11  # exponent of the gain
    WHEN_ABOVE = 12  # the edit holds where WHEN_ABOVE < f[WHEN_ROW] < WHEN_BELOW
    WHEN_BELOW = 13
    GAIN_WIDTH_POS = 14  # bin width of the gain table for f > 0; 0 = no table on this side
    GAIN_WIDTH_NEG = 15  # the same for f < 0, over |f|


class RowInt(enum.IntEnum):
    """Columns of ``row_int [S, K, len(RowInt)]``."""

    ACT = 0  # an Act
    NORM = 1  # a Norm
    NORM_UNITS = 2  # 1: SHIFT, LO and HI are multiples of |x|
    WHEN_ROW = 3  # row of the same slot that gates this one; -1 = none
    SELECT = 4  # bit mask: the edit holds on tokens whose bits meet it; 0 = the row only gates others
    TOPK = 5  # k of a TopK dictionary; 0 = the row's activation needs no rank
    SAE = 6  # number of the row's SAE at its site
    FEATURE = 7  # number of the row's feature in its SAE; -1 = a plain direction


class SlotFloat(enum.IntEnum):
    """Columns of ``slot_float [S, len(SlotFloat)]``."""

    DOSE_LIMIT = 0  # deltas larger than this multiple of |x| are scaled down to it; inf = no limit


class SlotInt(enum.IntEnum):
    """Columns of ``slot_int [S, len(SlotInt)]``."""

    ROWS = 0  # rows in use
    DROP_SELECT = 1  # bit mask: tokens whose bits meet it lose the reconstruction error (``base`` is added)
    DROP_SAE = 2  # number, at its site, of the SAE whose error is dropped
    SKIPS = 3  # a Skip: what no row in use asks for


class Skip(enum.IntFlag):
    """What no row of a slot asks for, so that an implementation may leave it out; 0 = leave nothing out."""

    NORM = 1  # every NORM is NONE
    ACTIVATION = 2  # every ACT is IDENTITY, RELU or JUMPRELU
    GAIN = 4  # no gain table
    MASK = 8  # no masked range
    BOUNDS = 16  # every LO and HI is infinite
    UNITS = 32  # no NORM_UNITS
    GATE = 64  # no WHEN_ROW
    LIMIT = 128  # DOSE_LIMIT is infinite


class Flag(enum.IntFlag):
    """What happened to a token, in ``flags [T]``."""

    TOUCHED = 1  # at least one row's SELECT met the token's bits
    OVER_DOSE = 2  # the dose limit was passed (and the delta scaled down to it)
    NON_FINITE = 4  # the result was not finite: the token was left as it was


LAYER_NORM_EPS = 1e-5
MAX_SELECTORS = 31  # bits of the token's int32 mask; the sign bit stays free
