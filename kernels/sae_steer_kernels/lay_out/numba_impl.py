"""``lay_out`` for CPUs, compiled: one walk over the tokens for each bucket in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import boolean, int32, int64, void

from sae_steer_kernels.feature_edit.numba_impl import compiling

if TYPE_CHECKING:
    from sae_steer_kernels.lay_out import BucketTokens, StepTokens

_NOTHING = np.zeros(0, np.bool_)


@numba.njit(
    [
        void(
            boolean, int64[::1], int64[::1], int64[::1], int64,
            int64[::1], int64[::1], int64[::1], int32[::1], boolean[::1],
            int64[::1], int32[::1], int64[::1], int64[:, ::1], int32[:, ::1], int32[::1], int32[:, ::1],
            int32[::1], int64[::1],
        )
    ],
    **compiling,
)  # fmt: skip
def _lay_out(
    begins: Any, step_starts: Any, positions: Any, ids: Any, vocabulary: Any,
    request: Any, absolute: Any, known: Any, bits: Any, wanted: Any,
    rows: Any, slot_of: Any, seen: Any, starts: Any, masks: Any, reads: Any, by_token: Any,
    slots: Any, counted: Any,
) -> None:  # fmt: skip
    """One bucket, of which the first ``begins``; a ``wanted`` of no tokens stands for one that is not there."""
    owner = 0
    for t in range(positions.size):
        while owner < rows.size - 1 and step_starts[owner + 1] <= t:
            owner += 1
        position = positions[t]
        if begins:
            request[t], absolute[t], bits[t] = owner, position, 0
            known[t] = min(max(ids[t], 0), vocabulary - 1)
            if wanted.size:
                wanted[t] = False
        row = rows[owner]
        slot = slot_of[row]
        piece = 0
        while piece + 1 < starts.shape[1] and starts[row, piece + 1] <= position:
            piece += 1
        held = masks[row, piece] & by_token[slot, known[t]]
        # A token that is computed again, after a preemption, counts once.
        first = position > seen[row]
        slots[t] = slot if held != 0 else 0
        counted[t] = row if held != 0 and first else 0
        bits[t] |= held
        if wanted.size and first and held & reads[row] != 0:
            wanted[t] = True
    for t in range(positions.size):
        if counted[t] != 0:
            seen[counted[t]] = max(seen[counted[t]], positions[t])


def lay_out_numba(tokens: StepTokens, buckets: Sequence[BucketTokens]) -> None:
    """Fills the results of the tokens and of each bucket."""
    given = [t.numpy().astype(np.int64, copy=False) for t in (tokens.starts, tokens.positions, tokens.ids)]
    results = [t.numpy() for t in (tokens.request, tokens.absolute, tokens.known, tokens.bits)]
    wanted = _NOTHING if tokens.wanted is None else tokens.wanted.numpy()
    for number, bucket in enumerate(buckets):
        own = (
            bucket.rows, bucket.slot, bucket.seen, bucket.starts, bucket.masks, bucket.reads, bucket.by_token,
            bucket.slots, bucket.counted,
        )  # fmt: skip
        arguments: list[Any] = [number == 0, *given, tokens.vocabulary, *results, wanted, *(t.numpy() for t in own)]
        _lay_out(*arguments)
