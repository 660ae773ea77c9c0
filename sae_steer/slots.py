"""Which program holds which slot: fixed capacity, reference counts, no tensors.

Slots come in buckets by how many rows they hold. Equal programs share a slot. A slot that nobody holds keeps its
content until somebody else needs it, so that a program that comes back is not loaded again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sae_steer.limits import Limits


@dataclass(frozen=True, slots=True)
class Slot:
    """A row of the device tables.

    Args:
        bucket: Number of the bucket.
        index: Number of the slot in its bucket, from 1: slot 0 means nothing.
    """

    bucket: int
    index: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """``slots`` slots of up to ``rows`` rows at a site."""

    slots: int
    rows: int


def buckets_of(limits: Limits) -> list[Bucket]:
    """The buckets of a host: ordinary slots and, where there are any, wide ones."""
    buckets = [Bucket(limits.max_programs, limits.rows)]
    return [*buckets, Bucket(limits.wide_programs, limits.wide_rows)] if limits.wide_programs else buckets


class SlotPool:
    """Hands out slots by content.

    Args:
        buckets: Capacities, narrow buckets first. A program goes into the narrowest bucket that holds it, and into no
            other, so that wide slots stay free for wide programs.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        if any(a.rows >= b.rows for a, b in zip(self.buckets, self.buckets[1:], strict=False)):
            raise ValueError("buckets must be given from narrow to wide")
        self._held: dict[str, tuple[Slot, int]] = {}
        self._free: list[OrderedDict[Slot, str | None]] = [
            OrderedDict((Slot(number, index), None) for index in range(1, bucket.slots + 1))
            for number, bucket in enumerate(self.buckets)
        ]
        self._resident: dict[str, Slot] = {}

    @property
    def in_use(self) -> int:
        """Number of slots that somebody holds."""
        return len(self._held)

    def bucket_for(self, rows: int) -> int:
        """The narrowest bucket for programs of ``rows`` rows; raises ``ValueError`` where none is wide enough."""
        for number, bucket in enumerate(self.buckets):
            if rows <= bucket.rows and bucket.slots:
                return number
        raise ValueError(f"no slot holds {rows} rows")

    def acquire(self, digest: str, rows: int) -> tuple[Slot, bool] | None:
        """Takes a slot for a program, or shares the one it has.

        Returns:
            The slot, and whether its content must be loaded; None where all fitting slots are held: wait.
        """
        if digest in self._held:
            slot, holders = self._held[digest]
            self._held[digest] = slot, holders + 1
            return slot, False
        free = self._free[self.bucket_for(rows)]
        if not free:
            return None
        resident = self._resident.get(digest)
        slot = resident if resident is not None else next(iter(free))
        evicted = free.pop(slot)
        if resident is None and evicted is not None:
            del self._resident[evicted]
        self._resident[digest] = slot
        self._held[digest] = slot, 1
        return slot, resident is None

    def release(self, digest: str) -> None:
        """Gives one hold back; the slot is free once nobody holds it. Raises ``KeyError`` where nobody does."""
        slot, holders = self._held[digest]
        if holders > 1:
            self._held[digest] = slot, holders - 1
            return
        del self._held[digest]
        self._free[slot.bucket][slot] = digest

    def forget(self, digest: str) -> None:
        """Gives the hold back and forgets the content, after loading it failed."""
        slot, _ = self._held[digest]
        self.release(digest)
        if digest not in self._held:
            self._free[slot.bucket][slot] = None
            self._free[slot.bucket].move_to_end(slot, last=False)
            self._resident.pop(digest, None)
