"""The definition of ``sparse_decode``: one feature after another, in float64. Slow, and meant to be read."""

import torch
from torch import Tensor


def sparse_decode_reference(
    ids: Tensor, values: Tensor, wanted: Tensor, dec: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``[T, D_out]`` float64; NaN in the rows of tokens that are not wanted.

    Arguments as in :func:`sae_steer_kernels.sparse_decode.sparse_decode`.
    """
    out = torch.full((ids.shape[0], dec.shape[1]), torch.nan, dtype=torch.float64)
    for t in range(ids.shape[0]):
        if int(wanted[t]) == 0:
            continue
        out[t] = 0 if bias is None else bias.double()
        for feature, value in zip(ids[t].tolist(), values[t].tolist(), strict=True):
            if feature >= 0:
                out[t] += value * dec[feature].double()
    return out
