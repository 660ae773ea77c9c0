"""``reconstruct`` in plain torch: the implementation for CPUs, and for dictionaries other than TopK ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import Norm, RowInt, SlotInt
from sae_steer_kernels.feature_edit.torch_impl import activations, preactivations
from sae_steer_kernels.sparse_decode.torch_impl import weighted_rows

# Decoder rows are added one by one where fewer than this share of the activations is not zero, and multiplied as a
# whole otherwise. On a CPU a gathered row takes about seven times what a matrix product takes for it.
SPARSE = 1 / 16


def reconstruct_torch(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    scratch: Sequence[Tensor],
    read: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Fills ``base``; arguments as in :func:`sae_steer_kernels.reconstruct.reconstruct`."""
    mine = slot_int[slots, SlotInt.DROP_SAE] == sae
    tokens = (mine & ((bits & slot_int[slots, SlotInt.DROP_SELECT]) != 0)).nonzero().squeeze(1)
    if tokens.numel() == 0:
        return
    x = (y if read is None else read)[tokens].float()
    written = y[tokens].float()
    if residual is not None:
        x, written = x + residual[tokens].float(), written + residual[tokens].float()
    norm = row_int[:, RowInt.NORM]
    pre, scale = preactivations(x, enc, row_float, norm)
    f = activations(pre, row_float, row_int, None)
    members = int(row_int[0, RowInt.TOPK])
    if members and members < f.shape[1]:
        # Fewer than k are larger than a feature where it is not below the k-th largest.
        f = torch.where(f < f.topk(members, dim=1).values[:, -1:], 0, f)
    decoded = _decode(f, dec) + dec_bias
    if scale is not None:
        decoded = decoded * scale[:, :1]
    if int(norm[0]) in (Norm.CENTER, Norm.LAYER_NORM):
        decoded = decoded + x.mean(dim=1, keepdim=True)
    base[tokens] = decoded - written


def _decode(f: Tensor, dec: Tensor) -> Tensor:
    """``f @ dec`` for ``f [t, F]``."""
    held = f != 0
    counts = held.sum(dim=1)
    if int(counts.sum()) > SPARSE * f.numel():
        return f @ dec
    return weighted_rows(held.nonzero()[:, 1], counts, f[held], dec)
