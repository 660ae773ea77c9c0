"""``sparse_decode``: the sum of a few features' decoder rows for each token, such as those of ``topk_readout``."""

import torch
from torch import Tensor

from sae_steer_kernels._call import call
from sae_steer_kernels._op import Op, lazily, torch_op, triton_obstacle
from sae_steer_kernels.sparse_decode.generate import generate
from sae_steer_kernels.sparse_decode.reference import sparse_decode_reference
from sae_steer_kernels.sparse_decode.torch_impl import sparse_decode_torch


def _run(
    ids: Tensor,
    values: Tensor,
    wanted: Tensor,
    active: Tensor,
    dec: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
) -> None:
    call(SPARSE_DECODE, out.device, active, (ids, values, wanted, dec, out, bias))


_sparse_decode = torch_op(_run, name="sparse_decode", mutates=("out",))


def sparse_decode(
    ids: Tensor,
    values: Tensor,
    wanted: Tensor,
    active: Tensor,
    dec: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
) -> None:
    """Writes ``sum_j values[t, j] dec[ids[t, j]] + bias`` for the tokens that are wanted; other rows are left alone.

    Args:
        ids: ``[T, k]`` int32 features, below F; -1 = none, whose value is not read.
        values: ``[T, k]`` float32.
        wanted: ``[T]`` int32; 0 = the token is not decoded.
        active: ``[]`` bool on the CPU: whether any token of the step is decoded. False returns at once.
        dec: ``[F, D_out]`` decoder rows.
        out: ``[T, D_out]`` float32.
        bias: ``[D_out]`` float32.
    """
    _sparse_decode(ids, values, wanted, active, dec, out, bias)


def _triton_takes(ids: Tensor, values: Tensor, wanted: Tensor, dec: Tensor, out: Tensor, bias: Tensor | None) -> str:
    if obstacle := triton_obstacle():
        return obstacle
    if not all(t is None or t.is_contiguous() for t in (ids, values, wanted, bias)):
        return "ids, values or bias are not contiguous"
    if dec.stride(1) != 1 or out.stride(1) != 1:
        return "the elements of a row are not next to each other"
    return ""


SPARSE_DECODE = Op(
    name="sparse_decode",
    reference=sparse_decode_reference,
    implementations={
        "torch": sparse_decode_torch,
        "triton": lazily("sae_steer_kernels.sparse_decode.triton_impl", "sparse_decode_triton"),
    },
    by_device={"cpu": "torch", "cuda": "triton"},
    # Relative error of a token against float64, by the dtype of ``out``: k products and sums in float32, 24 bits each.
    tolerances={torch.float32: 2e-6},
    supports={"triton": _triton_takes},
    generate=generate,
    host_free=frozenset({"triton"}),
)
