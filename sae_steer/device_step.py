"""The token -> slot map of one step, built on the device from what the host has there: no synchronisation."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.program import Program
from sae_steer.runs import RunTable
from sae_steer.slots import Bucket
from sae_steer_kernels import EditBuffers, TokenGroups, scratch_floats


class DeviceStep:
    """Persistent buffers that say, for each token of the step, which slot, selectors and run it has.

    Args:
        buckets: The slots.
        sites: Number of sites.
        capacity: Most tokens of a step, padding and all.
        vocabulary: Token ids are below this number.
        device: Where all of it lives.
        widths: ``D`` and ``D_out`` of each site where kernels edit: they get scratch, and tokens grouped by slot.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        sites: int,
        capacity: int,
        vocabulary: int,
        device: torch.device,
        widths: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.capacity = capacity
        self.device = device
        self.slots = tuple(torch.zeros(capacity, dtype=torch.int32, device=device) for _ in buckets)
        self.bits = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.runs = tuple(RunTable(sites, bucket.rows, device) for bucket in buckets)
        # Sites edit one after another, so they share what an edit needs, and where it reports.
        scratch = [max((scratch_floats(capacity, b.rows, *pair) for pair in widths), default=0) for b in buckets]
        self.buffers = tuple(
            EditBuffers.empty(tokens=capacity, rows=bucket.rows, device=device, scratch=floats)
            for bucket, floats in zip(buckets, scratch, strict=True)
        )
        self.groups = tuple(
            TokenGroups.empty(tokens=capacity, slots=bucket.slots + 1, device=device) for bucket in buckets if widths
        )
        self.tokens = 0
        # What a selector asks of token ids; -1 allows every selector.
        self._by_token = tuple(
            torch.full((bucket.slots + 1, vocabulary), -1, dtype=torch.int32, device=device) for bucket in buckets
        )
        self._vocabulary = vocabulary
        self._rows = tuple(torch.zeros(capacity, dtype=torch.int64, device=device) for _ in buckets)
        self._positions = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._touched = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._arange = torch.arange(capacity, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of what has a fixed size."""
        buffers = [t for b in self.buffers for t in (b.before, b.after, b.dose, b.flags, b.scratch) if t is not None]
        buffers += [t for groups in self.groups for t in (groups.order, groups.tiles)]
        mine = [*self.slots, self.bits, *self._by_token, *self._rows, self._positions, self._touched, self._arange]
        return sum(t.nbytes for t in [*buffers, *mine])

    def load(self, bucket: int, slot: int, program: Program) -> None:
        """Tells a slot what its program asks of token ids."""
        allowed = torch.from_numpy(program.by_token(self._vocabulary))
        self._by_token[bucket][slot] = allowed.to(self.device)

    def fill(
        self, rows: Sequence[NDArray[np.int64]], starts: Tensor, positions: Tensor, tokens: Tensor, count: int
    ) -> None:
        """Lays out a step.

        Args:
            rows: For each bucket ``[R]``: the row of each request of the batch, in its order; 0 = none.
            starts: ``[R + 1]`` where each request's tokens start in the step, on the device.
            positions: ``[T]`` absolute positions, on the device.
            tokens: ``[T]`` token ids, on the device.
            count: ``T``.
        """
        self.clear()
        if not any(row.any() for row in rows):
            return
        self.tokens = count
        place = self._arange[:count]
        request = (place[:, None] >= starts[1 : rows[0].size + 1]).sum(dim=1)
        positions = positions[:count].long()
        tokens = tokens[:count].long().clamp(0, self._vocabulary - 1)
        self._positions[:count] = positions
        bits = torch.zeros_like(self.bits[:count])
        for number, (run, own) in enumerate(zip(self.runs, rows, strict=True)):
            if not own.any():
                continue
            # Tokens beyond the last request are nobody's: ``count`` may be what the host hoped for.
            row = torch.from_numpy(np.append(own, 0)).to(self.device)[request]
            slot = run.slot[row]
            held = run.held(row, positions) & self._by_token[number][slot, tokens]
            self.slots[number][:count] = torch.where(held != 0, slot, 0)
            # A token that is computed again, after a preemption, counts once.
            self._rows[number][:count] = torch.where((held != 0) & (positions > run.seen[row]), row, 0)
            bits |= torch.where(row != 0, held, 0)
            if self.groups:
                self.groups[number].fill(self.slots[number][:count], self._by_token[number].shape[0])
        self.bits[:count] = bits

    def count(self, bucket: int, site: int, select: Tensor) -> None:
        """Adds what an edit just reported to the sums of its runs; ``select`` as in :meth:`RunTable.count`."""
        t = self.tokens
        row, slots, buffers = self._rows[bucket][:t], self.slots[bucket][:t], self.buffers[bucket].first(t)
        self._touched[:t] |= self.runs[bucket].count(site, row, slots, self.bits[:t], select, buffers)

    def finish(self, touched: Tensor | None = None) -> Tensor | None:
        """Ends a step.

        Args:
            touched: ``[T]`` bool, tokens that were touched at sites that another process has.

        Returns:
            ``[T]`` bool, the tokens that were touched here or there; None where no request was steered.
        """
        t = self.tokens
        if not t:
            return None
        if touched is not None:
            self._touched[:t] |= touched.to(self.device)
        for number, run in enumerate(self.runs):
            run.finish(self._rows[number][:t], self._positions[:t], self._touched[:t])
        return self._touched[:t].clone()

    def clear(self) -> None:
        """No token of the next forward pass has a slot."""
        if self.tokens:
            for slots, rows in zip(self.slots, self._rows, strict=True):
                slots.zero_()
                rows.zero_()
            for groups in self.groups:
                groups.tiles.zero_()
            self._touched.zero_()
        self.tokens = 0
