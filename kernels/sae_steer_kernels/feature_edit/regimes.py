"""How the kernels of ``feature_edit`` go through a step: which regime, in what sizes, with how much scratch.

All of it follows from the padded number of tokens and from the shapes of the tables, which a graph knows when it is
captured. Needs no Triton: hosts size their buffers by it.
"""

import math
from enum import StrEnum
from functools import cache
from typing import Any

SPLITS = 8  # programs that share a token in the two-phase regime
TAIL = 32  # floats beside their partial deltas; a multiple of 16 bytes keeps those aligned
FEW_TOKENS = 32
MANY_TOKENS = 256
FEW = 16  # tokens of a tile whose many scalars one program of the grouped regime keeps in registers
WIDEST = 8192  # columns that a program of the row kernels can hold twice over, as a token and as its delta


class Regime(StrEnum):
    """How a call goes through its tokens."""

    ROW = "row"
    TWO_PHASE = "two-phase"
    GROUPED = "grouped"


def choose(tokens: int, rows: int, *, scratch: bool, grouped: bool, batch_invariant: bool) -> Regime:
    """The regime of a call.

    The bounds are estimates from bytes and launches; ``benchmarks/gpu_ops.py`` measures every regime at every size.

    Args:
        tokens: ``T``, padding and all.
        rows: ``K``.
        scratch: Whether there is memory for partial results.
        grouped: Whether the tokens come grouped by slot.
        batch_invariant: Whether a token's bits may not depend on the number of tokens: one regime then serves all.
    """
    if batch_invariant or not scratch:
        return Regime.ROW
    if tokens <= FEW_TOKENS and rows > SPLITS:
        return Regime.TWO_PHASE
    if tokens > MANY_TOKENS and rows >= 16 and grouped:
        return Regime.GROUPED
    return Regime.ROW


def power_of_two(n: int) -> int:
    """The least power of two that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()


@cache
def row_shape(rows: int, width: int, width_out: int) -> dict[str, Any]:
    """Compile-time numbers of the row kernels: as many rows a turn as the registers hold."""
    bd, bd_out = max(32, power_of_two(width)), max(32, power_of_two(width_out))
    block = max(bd, bd_out)
    warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
    # Sixteen warps have half the registers each that eight have.
    turn = 32 * warps * (32 if warps == 16 else 64) // block
    return {
        "D": width, "BD": bd, "BD_OUT": bd_out, "BK": max(1, min(4, power_of_two(rows), turn)),
        "ROOT": math.sqrt(width), "num_warps": warps,
    }  # fmt: skip


@cache
def tile_shape(rows: int, width: int, width_out: int) -> dict[str, int]:
    """Compile-time numbers of the grouped kernels.

    The dot products of a narrow table are split in up to four parts; a wide one has blocks of rows enough.
    """
    bk, bd, bn = min(64, max(16, power_of_two(rows))), 32, 64
    share = -(-width // (4 if rows <= bk else 1))
    columns = -(-share // bd) * bd
    return {
        "BK": bk, "BD": bd, "BN": bn,
        "WIDTH": columns, "PARTS": -(-width // columns), "BLOCKS": -(-width_out // bn),
    }  # fmt: skip


def scratch_floats(tokens: int, rows: int, width: int, width_out: int) -> int:
    """Floats of scratch that steps of up to ``tokens`` tokens need, whichever regime they take.

    Args:
        tokens: ``T``.
        rows: ``K``.
        width: ``D``.
        width_out: ``D_out``.
    """
    few = two_phase_floats(min(tokens, FEW_TOKENS), width_out) if rows > SPLITS else 0
    many = grouped_floats(tokens, rows, width, width_out) if rows >= 16 and tokens > MANY_TOKENS else 0
    return max(few, many)


def two_phase_floats(tokens: int, width_out: int) -> int:
    """Floats of scratch of a two-phase call: partial deltas, and what goes with them."""
    return tokens * (SPLITS * width_out + TAIL)


def grouped_floats(tokens: int, rows: int, width: int, width_out: int) -> int:
    """Floats of scratch of a grouped call; see ``triton_tiles``."""
    shape = tile_shape(rows, width, width_out)
    return tokens * (shape["PARTS"] * (rows + 2) + rows + 1 + 3 * shape["BLOCKS"])
