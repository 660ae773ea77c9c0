"""Tokens of a step grouped by slot, so that tensor cores can take many tokens of one slot at a time."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

TILE = 64  # tokens of one slot that one program takes: the fewest for which Hopper's wide tensor-core products exist


def tile_count(tokens: int, slots: int) -> int:
    """Tiles that ``tokens`` tokens of ``slots`` slots (slot 0 among them) can need, whatever their slots are."""
    return -(-tokens // TILE) + slots


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Fixed buffers; every site of a step shares them.

    Args:
        order: ``[T]`` int32, tokens sorted by slot.
        tiles: ``[N, 3]`` int32: slot of a tile, and where its tokens start and end in ``order``. An empty tile starts
            where it ends. The tokens of slot 0 have tiles too.
    """

    order: Tensor
    tiles: Tensor

    @classmethod
    def empty(cls, *, tokens: int, slots: int, device: torch.device) -> Self:
        """Buffers for steps of up to ``tokens`` tokens and tables of ``slots`` slots, slot 0 among them."""
        return cls(
            torch.zeros(tokens, dtype=torch.int32, device=device),
            torch.zeros(tile_count(tokens, slots), 3, dtype=torch.int32, device=device),
        )

    def fill(self, slots: Tensor, table_slots: int) -> Self:
        """Groups a step's tokens, without a device synchronisation; returns a view of what the step uses.

        Must be called whenever ``slots`` changes: the op believes what stands here.

        Args:
            slots: ``[T]`` int32 slot of each token.
            table_slots: ``S``, slot 0 among them.
        """
        tokens = slots.shape[0]
        used = type(self)(self.order[:tokens], self.tiles[: tile_count(tokens, table_slots)])
        used.order.copy_(slots.sort(stable=True).indices)
        numbers = torch.arange(table_slots, device=slots.device, dtype=slots.dtype)
        counts = (slots[:, None] == numbers).sum(dim=0)
        ends = counts.cumsum(0)
        last_tiles = ((counts + TILE - 1) // TILE).cumsum(0)
        tile = torch.arange(used.tiles.shape[0], device=slots.device)
        slot = torch.searchsorted(last_tiles, tile, right=True)
        # Beyond the last tile: slot 0, and nothing in it.
        there = slot < table_slots
        slot = slot.clamp_max(table_slots - 1)
        before = torch.where(slot > 0, last_tiles[(slot - 1).clamp_min(0)], 0)
        start = torch.minimum(ends[slot] - counts[slot] + (tile - before) * TILE, ends[slot])
        end = torch.minimum(start + TILE, ends[slot])
        # A graph may hold a longer step, padded: what an earlier one left must not be taken for a tile of this one.
        self.tiles[used.tiles.shape[0] :].zero_()
        used.tiles[:, 0] = torch.where(there, slot, 0)
        used.tiles[:, 1] = torch.where(there, start, 0)
        used.tiles[:, 2] = torch.where(there, end, 0)
        return used
