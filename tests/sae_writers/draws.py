"""Weights that their type holds exactly, so that a test's own forward can start from what was written."""

from collections.abc import Callable

import torch
from torch import Tensor


def draws(seed: int, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """A function of a shape and a ``scale``, which gives normal numbers as ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return normal
