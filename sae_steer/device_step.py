"""The token -> slot map of one step, built on the device from what the host has there: no synchronisation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.device_reads import DeviceReads, Gathers
from sae_steer.program import Program
from sae_steer.read_store import store_for
from sae_steer.runs import RunTable
from sae_steer.sites import Site
from sae_steer.slots import Bucket
from sae_steer_kernels import LAY_OUT, BucketTokens, EditBuffers, StepTokens, TokenGroups, scratch_floats


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Which rows the requests of a batch have in a bucket's table; good for as long as the batch holds the same ones.

    Args:
        rows: ``[R + 1]`` int64 on the device, in the order of the batch; 0 = none. The last is that of tokens beyond
            the last request, for a step's count may be what the host hoped for.
        own: ``[N]`` int64 on the device, those that are not 0.
        edits: Whether any of their programs edits: where none does, there is nothing to count.
    """

    rows: Tensor
    own: Tensor
    edits: bool = True

    @classmethod
    def of(cls, rows: NDArray[np.int64], device: torch.device, *, edits: bool = True) -> Self | None:
        """From the row of each request ``[R]``; None where none has one."""
        own = rows[rows != 0]
        if not own.size:
            return None
        return cls(torch.from_numpy(np.append(rows, 0)).to(device), torch.from_numpy(own).to(device), edits)


class DeviceStep:
    """Persistent buffers that say, for each token of the step, which slot, selectors and run it has.

    Args:
        buckets: The slots.
        sites: All sites, in the model's order.
        capacity: Most tokens of a step, padding and all.
        vocabulary: Token ids are below this number.
        device: Where all of it lives.
        widths: ``D`` and ``D_out`` of each site where kernels edit: they get scratch, and tokens grouped by slot.
        few: In passes of at most so many rows every site reports to a place of its own, and all are counted at once.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        sites: Sequence[Site],
        capacity: int,
        vocabulary: int,
        device: torch.device,
        widths: Sequence[tuple[int, int]] = (),
        few: int = 64,
    ) -> None:
        self.capacity = capacity
        self.device = device
        self.slots = tuple(torch.zeros(capacity, dtype=torch.int32, device=device) for _ in buckets)
        self.bits = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.runs = tuple(RunTable(len(sites), bucket.rows, device) for bucket in buckets)
        self.groups = tuple(
            TokenGroups.empty(tokens=capacity, slots=bucket.slots + 1, device=device) for bucket in buckets if widths
        )
        self.tokens = 0
        self.few = min(few, capacity)
        self._sites = tuple(sites)
        self._few = tuple(
            EditBuffers.empty(tokens=len(sites) * self.few, rows=bucket.rows, device=device).split(len(sites))
            for bucket in buckets
        )
        # Sites edit one after another, so they share what an edit needs for itself.
        scratch = [max((scratch_floats(capacity, b.rows, *pair) for pair in widths), default=0) for b in buckets]
        self._many = tuple(
            EditBuffers.empty(tokens=capacity, rows=bucket.rows, device=device, scratch=floats)
            for bucket, floats in zip(buckets, scratch, strict=True)
        )
        self._few_of = [
            tuple(replace(few.at(site), scratch=many.scratch) for few, many in zip(self._few, self._many, strict=True))
            for site in range(len(sites))
        ]
        self._edited: tuple[list[int], ...] = tuple([] for _ in buckets)
        self._reported: list[int] = []  # sites that have reported what is to be read at the end of the step
        # On which selectors each row of a slot holds, at each site.
        self._selects = tuple(
            torch.zeros(len(sites), bucket.slots + 1, bucket.rows, dtype=torch.int32, device=device)
            for bucket in buckets
        )
        self._numbers = torch.arange(len(sites), device=device)
        # What a selector asks of token ids; -1 allows every selector.
        self._by_token = tuple(
            torch.full((bucket.slots + 1, vocabulary), -1, dtype=torch.int32, device=device) for bucket in buckets
        )
        self._vocabulary = vocabulary
        self._rows = tuple(torch.zeros(capacity, dtype=torch.int64, device=device) for _ in buckets)
        self._request, self._positions, self._ids = torch.zeros(3, capacity, dtype=torch.int64, device=device)
        self._wanted, self._untouched = torch.zeros(2, capacity, dtype=torch.bool, device=device)
        self._touched: Tensor | None = None
        self._batch: dict[int, BatchRows] = {}  # of the buckets that have a run in the step
        self._lay_out = LAY_OUT.implementation(device)
        self.reads: DeviceReads | None = None
        """What is read in the step; None = nothing."""
        self._store = store_for(device, widest=max(bucket.rows for bucket in buckets))

    @property
    def nbytes(self) -> int:
        """Bytes of what has a fixed size."""
        shared: list[Tensor] = [self.bits, self._request, self._positions, self._ids, self._wanted, self._untouched]
        mine = [*shared, *self.slots, *self._by_token, *self._rows, *self._selects]
        mine += [t for groups in self.groups for t in (groups.order, groups.tiles)]
        reports = sum(b.nbytes for b in (*self._few, *self._many))
        return sum(t.nbytes for t in mine) + reports + self._store.nbytes

    def load(self, bucket: int, slot: int, program: Program) -> None:
        """Tells a slot on which tokens its program's rows hold."""
        allowed = torch.from_numpy(program.by_token(self._vocabulary))
        self._by_token[bucket][slot] = allowed.to(self.device)
        selects = torch.zeros(len(self._sites), self._selects[bucket].shape[2], dtype=torch.int32)
        for part in program.sites:
            masks = torch.tensor([row.select for row in part.rows], dtype=torch.int32)
            selects[self._sites.index(part.site), : len(part.rows)] = masks
        self._selects[bucket][:, slot] = selects.to(self.device)

    def fill(
        self,
        batch: Sequence[BatchRows | None],
        starts: Tensor,
        positions: Tensor,
        ids: Tensor,
        count: int,
        gathers: Gathers | None = None,
    ) -> None:
        """Lays out a step.

        Args:
            batch: The rows of its requests in each bucket.
            starts: ``[R + 1]`` where each request's tokens start in the step, on the device.
            positions: ``[T]`` absolute positions, on the device.
            ids: ``[T]`` token ids, on the device.
            count: ``T``.
            gathers: What of each site's report is kept, of the tokens that are read; None = nothing is read.
        """
        self.clear()
        self._batch = {number: rows for number, rows in enumerate(batch) if rows is not None}
        if not self._batch:
            return
        self.tokens = count
        tokens = StepTokens(
            starts, positions[:count], ids[:count], self._vocabulary, self._request[:count], self._positions[:count],
            self._ids[:count], self.bits[:count], None if gathers is None else self._wanted[:count],
        )  # fmt: skip
        self._lay_out(tokens, [self._tokens_of(number, own.rows, count) for number, own in self._batch.items()])
        for number in self._batch if self.groups else ():
            self.groups[number].fill(self.slots[number][:count], self._by_token[number].shape[0])
        if gathers is not None:
            self._store.clear()
            self.reads = DeviceReads.of(gathers, tokens, self._store)

    def _tokens_of(self, bucket: int, rows: Tensor, count: int) -> BucketTokens:
        run = self.runs[bucket]
        return BucketTokens(
            rows, run.slot, run.seen, run.starts, run.masks, run.reads, self._by_token[bucket],
            self.slots[bucket][:count], self._rows[bucket][:count],
        )  # fmt: skip

    def reports(self, site: int, rows: int) -> tuple[EditBuffers, ...]:
        """Where a site's edit reports, for each bucket, in a forward pass of so many rows."""
        return self._few_of[site] if rows <= self.few else self._many

    def edited(self, site: int, buckets: Iterable[int], rows: int) -> None:
        """Counts, now or at the end of the step, what a site's edit has reported; ``rows`` as in :meth:`reports`."""
        if self.reads is not None:
            if rows <= self.few:
                self._reported.append(site)
            else:
                self.reads.gather(site, self._many)
        for bucket in buckets:
            if not self._batch[bucket].edits:
                continue
            if rows <= self.few:
                self._edited[bucket].append(site)
            else:
                self._count(bucket, self._numbers[site, None], self._many[bucket].split(1))

    def _count(self, bucket: int, sites: Tensor, reports: EditBuffers) -> None:
        t = self.tokens
        row, slots = self._rows[bucket][:t], self.slots[bucket][:t]
        select = self._selects[bucket]
        told = EditBuffers(reports.before[:, :t], reports.after[:, :t], reports.dose[:, :t], reports.flags[:, :t])
        if len(sites) < len(select):
            select = select[sites]
        touched = self.runs[bucket].count(sites, row, slots, self.bits[:t], select, told)
        self._touched = touched if self._touched is None else self._touched | touched

    def _count_few(self) -> None:
        for bucket, edited in enumerate(self._edited):
            if not edited:
                continue
            sites, reports = self._numbers, self._few[bucket]
            if edited != list(range(len(self._sites))):
                # A site that this pass did not reach holds what an earlier one left there.
                sites = torch.tensor(edited, device=self.device)
                reports = reports.at(sites)
            self._count(bucket, sites, reports)
            edited.clear()

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
        self._count_few()
        if self.reads is not None:
            for site in self._reported:
                self.reads.gather(site, self._few_of[site])
        found = self._touched if self._touched is not None else self._untouched[:t]
        if touched is not None:
            found = found | touched.to(self.device)
        for number, own in self._batch.items():
            if own.edits:
                self.runs[number].count_touched(self._rows[number][:t], found)
        return found

    def clear(self) -> None:
        """No token of the next forward pass has a slot."""
        if self.tokens:
            for number in self._batch:
                self.slots[number].zero_()
                self._rows[number].zero_()
                if self.groups:
                    self.groups[number].tiles.zero_()
            self._touched = None
            self._reported.clear()
            for edited in self._edited:  # a pass that failed half-way is not counted with the next one
                edited.clear()
        self.tokens, self.reads = 0, None
