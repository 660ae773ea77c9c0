"""The definition of ``lay_out``, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_steer_kernels.lay_out import BucketTokens, StepTokens


def lay_out_reference(tokens: StepTokens, buckets: Sequence[BucketTokens]) -> None:
    """Fills the results of the tokens and of each bucket."""
    starts = tokens.starts.tolist()
    for t, (position, given) in enumerate(zip(tokens.positions.tolist(), tokens.ids.tolist(), strict=True)):
        requests = len(buckets[0].rows) - 1
        owners = [r for r in range(requests) if starts[r] <= t < starts[r + 1]]
        request = owners[0] if owners else requests
        token = min(max(given, 0), tokens.vocabulary - 1)
        tokens.request[t], tokens.absolute[t], tokens.known[t] = request, position, token
        bits, wanted = 0, False
        for bucket in buckets:
            row = int(bucket.rows[request])
            slot = int(bucket.slot[row])
            begun = [piece for piece, start in enumerate(bucket.starts[row].tolist()) if start <= position]
            held = int(bucket.masks[row, begun[-1]]) & int(bucket.by_token[slot, token])
            first = position > int(bucket.seen[row])
            bucket.slots[t] = slot if held else 0
            bucket.counted[t] = row if held and first else 0
            bits |= held
            wanted |= first and bool(held & int(bucket.reads[row]))
        tokens.bits[t] = bits
        if tokens.wanted is not None:
            tokens.wanted[t] = wanted
    for bucket in buckets:
        for row, position in zip(bucket.counted.tolist(), tokens.absolute.tolist(), strict=True):
            if row:
                bucket.seen[row] = max(int(bucket.seen[row]), position)
