"""``sparse_decode`` in Triton: a token's few decoder rows, one block of columns a program, in one fixed order."""

# See feature_edit/triton_edit.py.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

# Columns of a program and rows that it reads at a time: 16 KB under way.
COLUMNS, ROWS = 512, 8


@triton.jit
def decoded(ids, values, token, dec, dec_stride, columns, inside, k, BK: tl.constexpr, BD: tl.constexpr):
    """``[BD]`` columns of the sum of one token's decoder rows; an id of -1 is no row."""
    total = tl.zeros((BD,), dtype=tl.float32)
    for start in range(0, k, BK):
        place = start + tl.arange(0, BK)
        feature = tl.load(ids + token * k + place, mask=place < k, other=-1)
        held = feature >= 0
        value = tl.load(values + token * k + place, mask=held, other=0.0)
        rows = tl.load(
            dec + feature.to(tl.int64)[:, None] * dec_stride + columns[None, :],
            mask=held[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * value[:, None], axis=0)
    return total


@triton.jit
def decode_kernel(
    ids, values, wanted, dec, dec_stride, bias, out, out_stride, D, k, BK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Grid ``(T, D_out / BD)``."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + token) == 0:
        return
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    total = decoded(ids, values, token, dec, dec_stride, columns, inside, k, BK, BD)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total, mask=inside)


def blocks(width: int) -> tuple[int, dict[str, int]]:
    """How many programs share a token's ``width`` columns, and the sizes of their blocks."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return triton.cdiv(width, columns), {"BK": ROWS, "BD": columns}


def sparse_decode_triton(
    ids: Tensor, values: Tensor, wanted: Tensor, dec: Tensor, out: Tensor, bias: Tensor | None
) -> None:
    """Fills ``out``; arguments as in :func:`sae_steer_kernels.sparse_decode.sparse_decode`."""
    tokens, k = ids.shape
    if tokens == 0:
        return
    width = dec.shape[1]
    count, sizes = blocks(width)
    decode_kernel[(tokens, count)](
        ids, values, wanted, dec, dec.stride(0), bias, out, out.stride(0), width, k,
        **sizes, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
