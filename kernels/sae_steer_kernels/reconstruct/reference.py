"""The definition of ``reconstruct``: one token, one feature at a time, in float64. Slow, and meant to be read."""

import math

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import Norm, RowInt, SlotInt
from sae_steer_kernels.topk_readout.reference import dictionary_activations


def reconstruct_reference(
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
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``decode(encode(x)) - y``, ``[T, D_out]`` float64; NaN in the rows of tokens that do not drop this SAE's error.

    Arguments as in :func:`sae_steer_kernels.reconstruct.reconstruct`.
    """
    base = torch.full(y.shape, torch.nan, dtype=torch.float64)
    for t in range(y.shape[0]):
        scalars = slot_int[int(slots[t])]
        if int(scalars[SlotInt.DROP_SAE]) != sae or int(bits[t]) & int(scalars[SlotInt.DROP_SELECT]) == 0:
            continue
        x, written = (y if read is None else read)[t].double(), y[t].double()
        if residual is not None:
            x, written = x + residual[t].double(), written + residual[t].double()
        decoded = dec_bias.double()
        for j, f in enumerate(dictionary_activations(x, enc, row_float, row_int)):
            decoded = decoded + f * dec[j].double()
        match Norm(int(row_int[0, RowInt.NORM])):
            case Norm.CENTER:
                decoded = decoded + x.mean()
            case Norm.LAYER_NORM:
                decoded = decoded * x.std(unbiased=True) + x.mean()
            case Norm.NORM_RESCALE:
                decoded = decoded * x.norm() / math.sqrt(x.numel())
        base[t] = decoded - written
    return base
