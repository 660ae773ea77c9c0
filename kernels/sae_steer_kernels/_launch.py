"""How kernels over a whole dictionary are launched: tile sizes and options, by what a graph's capture knows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the encode product.

    Args:
        features: Encoder rows, ``BF``.
        tokens: ``BT``.
        width: Elements that are multiplied at a time, ``BD``.
        upcast: Whether bfloat16 products are done in float32: the interpreter knows no other way.
        options: Launch options.
    """

    features: int
    tokens: int
    width: int
    upcast: bool
    options: dict[str, Any]


def _small_register_file() -> bool:
    """Whether matrix instructions take all they multiply from registers, as on NVIDIA's devices before Hopper."""
    if knobs.runtime.interpret:
        return False
    target: Any = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch < 90)


CHUNK = 32  # the same for every tile, so that how a token's products are summed does not hang on the step's size


def dictionary_tile(tokens: int) -> Tile:
    """The tile for a step padded to ``tokens`` tokens.

    The sizes are the largest at which a count in the epilogue needs no more registers than there are.
    """
    if tokens <= 16:
        block, warps, stages = 16, 4, 6
    elif tokens <= 32 or _small_register_file():
        block, warps, stages = 32, 4, 4
    else:
        block, warps, stages = 64, 8, 4
    return Tile(
        features=64,
        tokens=block,
        width=CHUNK,
        upcast=knobs.runtime.interpret,
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def narrow(x: Tensor, residual: Tensor | None) -> bool:
    """Whether what is encoded is bfloat16 as it is read, so that three products make up one of float32, and not six."""
    return x.dtype is torch.bfloat16 and residual is None
