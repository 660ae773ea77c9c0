"""``lay_out`` in plain torch: no value is read on the host, so that no device is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_steer_kernels.lay_out import BucketTokens, StepTokens


def lay_out_torch(tokens: StepTokens, buckets: Sequence[BucketTokens]) -> None:
    """Fills the results of the tokens and of each bucket."""
    positions, known, request = tokens.absolute, tokens.known, tokens.request
    positions.copy_(tokens.positions)
    torch.clamp(tokens.ids.long(), 0, tokens.vocabulary - 1, out=known)
    ends = tokens.starts[1 : buckets[0].rows.shape[0]]
    numbers = torch.arange(positions.shape[0], dtype=ends.dtype, device=ends.device)
    torch.searchsorted(ends, numbers, right=True, out=request)
    for number, bucket in enumerate(buckets):
        row = bucket.rows[request]
        slot = bucket.slot[row]
        piece = (bucket.starts[row] <= positions[:, None]).sum(dim=1) - 1
        held = bucket.masks[row, piece] & bucket.by_token[slot, known]
        holds = held != 0
        torch.mul(slot, holds, out=bucket.slots)
        # A token that is computed again, after a preemption, counts once.
        first = positions > bucket.seen[row]
        torch.mul(row, holds & first, out=bucket.counted)
        read = ((held & bucket.reads[row]) != 0) & first
        # Row 0, of which nobody asks, takes what does not count.
        bucket.seen.scatter_reduce_(0, bucket.counted, positions, "amax")
        if number == 0:
            tokens.bits.copy_(held)
        else:
            tokens.bits.bitwise_or_(held)
        if tokens.wanted is None:
            continue
        if number == 0:
            tokens.wanted.copy_(read)
        else:
            tokens.wanted.logical_or_(read)
