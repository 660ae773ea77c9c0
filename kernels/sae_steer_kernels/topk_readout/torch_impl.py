"""``topk_readout`` in plain torch: the implementation for CPUs. It holds ``[t, F]`` in memory."""

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import RowInt
from sae_steer_kernels.feature_edit.torch_impl import activations, preactivations


def largest(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of ``f [t, F]``, largest first, the lower number first among equals."""
    k = min(k, f.shape[1])
    least = f.topk(k, dim=1).values[:, -1:]
    above, equal = f > least, f == least
    # torch.topk says nothing of ties: of those at the edge, take the first.
    chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    ids = chosen.nonzero()[:, 1].view(-1, k)
    order = f.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order.indices), order.values


def topk_readout_torch(
    x: Tensor,
    wanted: Tensor,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    ids: Tensor,
    values: Tensor,
    moments: Tensor,
    groups: Tensor,
    places: Tensor,
    chosen: Tensor,
    candidates: Tensor,
    todo: Tensor,
    residual: Tensor | None,
) -> None:
    """Fills ``ids`` and ``values``; arguments as in :func:`sae_steer_kernels.topk_readout.topk_readout`."""
    tokens = wanted.nonzero().squeeze(1)
    if tokens.numel() == 0:
        return
    read = x[tokens].float()
    if residual is not None:
        read = read + residual[tokens].float()
    pre, _ = preactivations(read, enc, row_float, row_int[:, RowInt.NORM])
    f = activations(pre, row_float, row_int, None)
    # A token that is not finite has no active feature.
    found, f = largest(torch.where(f > 0, f, 0), ids.shape[1])
    held = f > 0
    members = int(row_int[0, RowInt.TOPK])
    if members:
        held &= (f[:, None, :] > f[:, :, None]).sum(dim=2) < members
    ids[tokens], values[tokens] = -1, 0
    count = found.shape[1]
    ids[tokens, :count] = torch.where(held, found, -1).to(ids.dtype)
    values[tokens, :count] = torch.where(held, f, 0)
