"""What kernels over a whole dictionary share: a token's moments, and the activations of a tile.

Nothing here is launched by itself. Every load is widened to float32 at once: in Triton's interpreter arithmetic on
bfloat16 is silently wrong.
"""

# See feature_edit/triton_edit.py.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from sae_steer_kernels.feature_edit.triton_edit import FLOATS, INTS, activated

# Columns of a token's moments.
MEAN = tl.constexpr(0)
STD = tl.constexpr(1)
LENGTH = tl.constexpr(2)
MOMENTS = tl.constexpr(3)


@triton.jit
def load_x(x, x_stride, residual, residual_stride, token, d, mask):
    """Elements ``d`` of tokens, ``x + residual`` in float32; ``token`` int64 broadcasts against ``d``."""
    value = tl.load(x + token * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + token * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def moments_of(x, x_stride, residual, residual_stride, token, norm, D, BD: tl.constexpr):
    """Mean, unbiased standard deviation and length of one token; anything where no normalisation asks for them."""
    total = 0.0
    squares = 0.0
    spread = 0.0
    if norm != 0:
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            value = load_x(x, x_stride, residual, residual_stride, token, d, d < D)
            total += tl.sum(value)
            squares += tl.sum(value * value)
        # In a pass of its own: the difference of two large sums would lose the variance of a token far from zero.
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            value = load_x(x, x_stride, residual, residual_stride, token, d, d < D)
            away = tl.where(d < D, value - total / D, 0.0)
            spread += tl.sum(away * away)
    return total / D, tl.sqrt(spread / (D - 1)), tl.sqrt(squares)


@triton.jit
def store_moments(moments, token, mean, std, length):
    """Keeps them in ``moments [T, 3]``."""
    tl.store(moments + token * MOMENTS + MEAN, mean)
    tl.store(moments + token * MOMENTS + STD, std)
    tl.store(moments + token * MOMENTS + LENGTH, length)


@triton.jit
def append(todo, token):
    """Adds a token to the list ``todo``: its length, then its members in any order."""
    place = tl.atomic_add(todo, 1, sem="relaxed")
    tl.store(todo + 1 + place, token.to(tl.int32))


@triton.jit
def _parts(value, UPCAST: tl.constexpr):
    """Three bfloat16 numbers whose sum is a float32 number, all 24 bits of it, but for the smallest ones."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if UPCAST:
        return high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32)
    return high, middle, low


@triton.jit
def _product(rows, columns, NARROW: tl.constexpr, UPCAST: tl.constexpr):
    """``rows [BF, BD] @ columns [BD, BT]`` to float32's precision, on tensor cores; NARROW: columns are bfloat16."""
    high, middle, low = _parts(rows, UPCAST)
    if NARROW:
        # Exact products: eight bits times eight.
        if UPCAST:
            columns = columns.to(tl.float32)
        total = tl.dot(low, columns, input_precision="ieee")
        total = tl.dot(middle, columns, total, input_precision="ieee")
        return tl.dot(high, columns, total, input_precision="ieee")
    x_high, x_middle, x_low = _parts(columns, UPCAST)
    total = tl.dot(low, x_high, input_precision="ieee")
    total = tl.dot(high, x_low, total, input_precision="ieee")
    total = tl.dot(middle, x_middle, total, input_precision="ieee")
    total = tl.dot(middle, x_high, total, input_precision="ieee")
    total = tl.dot(high, x_middle, total, input_precision="ieee")
    return tl.dot(high, x_high, total, input_precision="ieee")


@triton.jit
def tile_activations(
    x, x_stride, residual, residual_stride, moments, tokens, live,
    enc, enc_stride, row_float, row_int, features, exists, D, ROOT: tl.constexpr, SKIPS: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``[BF, BT]`` activations of ``features`` on ``tokens`` (int64 each); those of TopK as if all were members.

    The features are the long side of the product, so that a step of few tokens still fills a matrix instruction.
    Chunks of BD elements are added up outside of the tensor cores, which round each sum towards zero.
    """
    dots = tl.zeros((BF, BT), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (d < D)[None, :]
        rows = tl.load(enc + features[:, None] * enc_stride + d[None, :], mask=exists[:, None] & inside, other=0.0)
        if NARROW:
            columns = tl.load(x + tokens[:, None] * x_stride + d[None, :], mask=live[:, None] & inside, other=0.0)
        else:
            columns = load_x(
                x, x_stride, residual, residual_stride, tokens[:, None], d[None, :], live[:, None] & inside
            )
        dots += _product(rows.to(tl.float32), tl.trans(columns), NARROW, UPCAST)
    mean = tl.load(moments + tokens * MOMENTS + MEAN, mask=live, other=0.0)[None, :]
    std = tl.load(moments + tokens * MOMENTS + STD, mask=live, other=1.0)[None, :]
    length = tl.load(moments + tokens * MOMENTS + LENGTH, mask=live, other=1.0)[None, :]
    floats = row_float + features[:, None] * FLOATS
    ints = row_int + features[:, None] * INTS
    f, _ = activated(dots, length, mean, std, 0, floats, ints, exists[:, None], SKIPS, ROOT)
    return f
