"""Random, well-formed calls of ``topk_readout``."""

from typing import Any

import torch

from sae_steer_kernels._random import dictionary
from sae_steer_kernels.feature_edit.layout import Act, Norm


def generate(
    seed: int,
    device: torch.device,
    *,
    tokens: int = 5,
    width: int = 24,
    features: int = 150,
    act: Act = Act.RELU,
    norm: Norm = Norm.NONE,
    topk: int = 9,
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
) -> dict[str, Any]:
    """The arguments of :func:`~sae_steer_kernels.topk_readout.topk_readout` but for ``active`` and ``buffers``.

    The first token is wanted, and three in four of the others.

    Args:
        seed: Of everything random.
        device: Where all of it lives.
        tokens: ``T``.
        width: ``D``.
        features: ``F``.
        act: Of the dictionary.
        norm: Of the dictionary.
        topk: Of a TopK dictionary.
        dtype: Of the tokens.
        residual: Whether the stream comes in two parts.
    """
    g = torch.Generator().manual_seed(seed)
    whole = dictionary(g, features=features, width=width, width_out=width, act=act, norm=norm, topk=topk)
    wanted = (torch.rand(tokens, generator=g) < 0.75).int()
    wanted[:1] = 1
    return {
        "x": torch.randn(tokens, width, generator=g).to(dtype).to(device),
        "wanted": wanted.to(device),
        "enc": whole.enc.to(device),
        "row_float": whole.row_float.to(device),
        "row_int": whole.row_int.to(device),
        "residual": torch.randn(tokens, width, generator=g).to(dtype).to(device) if residual else None,
    }
