"""Random but well-formed dictionaries, which the generators of the ops over whole dictionaries start from."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit import empty_rows
from sae_steer_kernels.feature_edit.layout import Act, Norm, RowFloat, RowInt


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A whole dictionary.

    Args:
        enc: ``[F, D]`` float32.
        dec: ``[F, D_out]`` float32.
        dec_bias: ``[D_out]`` float32.
        row_float: ``[F, len(RowFloat)]``.
        row_int: ``[F, len(RowInt)]``.
    """

    enc: Tensor
    dec: Tensor
    dec_bias: Tensor
    row_float: Tensor
    row_int: Tensor


def dictionary(
    g: torch.Generator, *, features: int, width: int, width_out: int, act: Act, norm: Norm, topk: int = 0
) -> Dictionary:
    """A random dictionary, of SAE number 0; ``topk`` is its k where ``act`` is TOPK."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    enc = normal(features, width) / math.sqrt(width)
    floats, ints = empty_rows((features,), torch.device("cpu"))
    floats[:, RowFloat.BIAS] = 0.3 * normal(features)
    floats[:, RowFloat.THETA] = 0.5 * normal(features).abs()
    floats[:, RowFloat.MAG_SCALE] = (0.3 * normal(features)).exp()
    floats[:, RowFloat.MAG_BIAS] = 0.3 * normal(features)
    floats[:, RowFloat.ENC_SUM] = enc.sum(-1)
    ints[:, RowInt.ACT] = int(act)
    ints[:, RowInt.NORM] = int(norm)
    ints[:, RowInt.TOPK] = topk if act is Act.TOPK else 0
    ints[:, RowInt.FEATURE] = torch.arange(features, dtype=torch.int32)
    dec = normal(features, width_out) / math.sqrt(width_out)
    return Dictionary(enc, dec, 0.1 * normal(width_out), floats, ints)
