"""``reconstruct``: what replacing a token by its SAE reconstruction adds to it, for ``error: drop``.

Needs the whole dictionary, so it is an op of its own: only tokens that asked for it pay, and edits never do.
"""

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import Norm, RowInt, SlotInt
from sae_steer_kernels.feature_edit.torch_impl import activations, preactivations


@torch.library.custom_op("sae_steer::reconstruct", mutates_args=("base",))
def reconstruct(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    active: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes ``decode(encode(x)) - y`` into ``base`` for the tokens that drop the reconstruction error of one SAE.

    Args:
        y: ``[T, D_out]`` tensor that is going to be written.
        slots: ``[T]`` int32 slot of each token.
        bits: ``[T]`` int32 selectors of each token.
        active: ``[]`` bool on the CPU: whether any token of the step has a slot.
        slot_int: ``[S, len(SlotInt)]``; says which tokens of a slot drop, and the error of which SAE.
        sae: Number of this SAE at its site.
        enc: ``[F, D]`` float32 encoder.
        dec: ``[F, D_out]`` float32 decoder.
        dec_bias: ``[D_out]`` float32.
        row_float: ``[F, len(RowFloat)]``.
        row_int: ``[F, len(RowInt)]``.
        base: ``[T, D_out]`` float32; only the rows of dropping tokens are written.
        read: ``[T, D]`` what is encoded, where it is not ``y``.
        residual: ``[T, D]`` added to what is encoded and to ``y``.
    """
    if not bool(active):
        return
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
    f = activations(pre, row_float, row_int, _ranks(pre) if int(row_int[0, RowInt.TOPK]) else None)
    decoded = f @ dec + dec_bias if scale is None else (f * scale) @ dec + dec_bias * scale[:, :1]
    if int(norm[0]) in (Norm.CENTER, Norm.LAYER_NORM):
        decoded = decoded + x.mean(dim=1, keepdim=True)
    base[tokens] = decoded - written


def _ranks(pre: Tensor) -> Tensor:
    """How many values of its row exceed each value: ``[t, F]`` to ``[t, F]`` int64."""
    return pre.shape[1] - torch.searchsorted(pre.sort(dim=1).values, pre.contiguous(), right=True)


@reconstruct.register_fake
def _(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    active: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    return None
