"""Slots: no two programs in one, none lost, and what is there is not loaded again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sae_steer.slots import Bucket, Slot, SlotPool

BUCKETS = (Bucket(2, 4), Bucket(0, 6), Bucket(1, 8))
ROWS = {"a": 1, "b": 4, "c": 2, "d": 3, "e": 5, "f": 6, "g": 8}  # by digest; e, f and g are wide


class Slots(RuleBasedStateMachine):
    """Against a model that knows who holds what, and what each slot's memory contains."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(BUCKETS)
        self.held: dict[str, list[Slot]] = {}
        self.content: dict[Slot, str] = {}
        self.released: list[str] = []  # resident and not held, the one that waits longest first

    def bucket(self, digest: str) -> int:
        return 0 if ROWS[digest] <= 4 else 2

    @rule(digest=st.sampled_from(sorted(ROWS)))
    def acquire(self, digest: str) -> None:
        bucket = self.bucket(digest)
        holders = {d for d in self.held if self.bucket(d) == bucket}
        resident = digest in self.content.values()
        found = self.pool.acquire(digest, ROWS[digest])
        if found is None:
            assert digest not in holders
            assert len(holders) == BUCKETS[bucket].slots
            return
        slot, fresh = found
        assert slot.bucket == bucket
        assert 1 <= slot.index <= BUCKETS[bucket].slots
        assert fresh is not resident
        for other in self.held:
            assert (self.held[other][0] == slot) == (other == digest)
        if fresh:
            evicted = self.content.get(slot)
            if evicted is not None:  # only where no slot is empty, and then the one that has waited longest
                waiting = [d for d in self.released if self.bucket(d) == bucket]
                assert evicted == waiting[0]
                assert sum(s.bucket == bucket for s in self.content) == BUCKETS[bucket].slots
                self.released.remove(evicted)
            self.content[slot] = digest
        assert self.content[slot] == digest
        if digest in self.released:
            self.released.remove(digest)
        self.held.setdefault(digest, []).append(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(digest)
        self._drop(digest)
        if digest not in self.held:
            self.released.append(digest)

    @precondition(lambda self: any(len(slots) == 1 for slots in self.held.values()))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(d for d, slots in self.held.items() if len(slots) == 1)))
        del self.content[self.held[digest][0]]
        self.pool.forget(digest)
        self._drop(digest)

    def _drop(self, digest: str) -> None:
        self.held[digest].pop()
        if not self.held[digest]:
            del self.held[digest]

    @rule(digest=st.sampled_from(sorted(ROWS)))
    def release_what_nobody_holds(self, digest: str) -> None:
        if digest not in self.held:
            with pytest.raises(KeyError):
                self.pool.release(digest)

    @invariant()
    def counts(self) -> None:
        assert self.pool.in_use == len(self.held)

    def teardown(self) -> None:
        """No leak: once everything is given back, every slot can be taken."""
        for digest, slots in list(self.held.items()):
            for _ in slots:
                self.pool.release(digest)
        assert self.pool.in_use == 0
        for bucket in BUCKETS:
            taken = [self.pool.acquire(f"new {bucket.rows} {i}", bucket.rows) for i in range(bucket.slots)]
            assert None not in taken


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_program_goes_into_the_narrowest_bucket_that_holds_it() -> None:
    pool = SlotPool(BUCKETS)
    assert [pool.bucket_for(rows) for rows in (0, 1, 4, 5, 6, 7, 8)] == [0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="9 rows"):
        pool.bucket_for(9)


def test_narrow_programs_wait_although_wide_slots_are_free() -> None:
    pool = SlotPool([Bucket(1, 4), Bucket(1, 8)])
    assert pool.acquire("a", 1) is not None
    assert pool.acquire("b", 1) is None
    assert pool.acquire("c", 8) is not None


def test_a_resident_program_needs_no_load_until_it_is_evicted() -> None:
    pool = SlotPool([Bucket(1, 4)])
    assert pool.acquire("a", 1) == (Slot(0, 1), True)
    pool.release("a")
    assert pool.acquire("a", 1) == (Slot(0, 1), False)
    pool.release("a")
    assert pool.acquire("b", 1) == (Slot(0, 1), True)
    pool.release("b")
    assert pool.acquire("a", 1) == (Slot(0, 1), True)


def test_what_failed_to_load_is_loaded_again() -> None:
    pool = SlotPool([Bucket(2, 4)])
    pool.acquire("a", 1)
    pool.forget("a")
    assert pool.in_use == 0
    assert pool.acquire("a", 1) == (Slot(0, 1), True)


def test_slot_zero_is_never_handed_out() -> None:
    pool = SlotPool([Bucket(3, 4)])
    found = [pool.acquire(name, 1) for name in "abc"]
    assert sorted(slot.index for slot, _ in filter(None, found)) == [1, 2, 3]


@pytest.mark.parametrize("rows", [(4, 4), (8, 4)])
def test_buckets_go_from_narrow_to_wide(rows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="narrow to wide"):
        SlotPool([Bucket(1, rows[0]), Bucket(1, rows[1])])
