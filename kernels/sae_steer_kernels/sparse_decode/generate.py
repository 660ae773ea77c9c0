"""Random, well-formed calls of ``sparse_decode``."""

from typing import Any

import torch


def generate(
    seed: int,
    device: torch.device,
    *,
    tokens: int = 5,
    width: int = 24,
    features: int = 70,
    k: int = 6,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> dict[str, Any]:
    """The arguments of :func:`~sae_steer_kernels.sparse_decode.sparse_decode` but for ``active`` and ``out``.

    The first token is wanted, and three in four of the others. One place in four is empty, and has the value NaN.

    Args:
        seed: Of everything random.
        device: Where all of it lives.
        tokens: ``T``.
        width: ``D_out``.
        features: ``F``.
        k: Places for each token.
        dtype: Of the decoder rows.
        bias: Whether there is one.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(features, (tokens, k), generator=g, dtype=torch.int32)
    values = torch.randn(tokens, k, generator=g)
    empty = torch.rand(tokens, k, generator=g) < 0.25
    wanted = (torch.rand(tokens, generator=g) < 0.75).int()
    wanted[:1] = 1
    return {
        "ids": ids.masked_fill(empty, -1).to(device),
        "values": values.masked_fill(empty, torch.nan).to(device),
        "wanted": wanted.to(device),
        "dec": torch.randn(features, width, generator=g).to(dtype).to(device),
        "bias": torch.randn(width, generator=g).to(device) if bias else None,
    }
