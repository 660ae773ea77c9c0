"""The gate: no two programs in one slot, nobody waits without a reason, or for ever, and nobody is forgotten."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.sites import Site
from sae_steer.slots import Bucket, Slot
from sae_steer_vllm import gate as gate_module
from sae_steer_vllm.gate import Gate

BUCKETS = (Bucket(2, 2), Bucket(1, 4))
SITE = Site.parse("resid_post.1")


def program(number: int, rows: int) -> Program:
    edits = tuple(Row("sha256:a", i, "add", shift=float(number), selector=0) for i in range(rows))
    return Program((SiteProgram(SITE, edits),), (Selector(Phase.ALL),))


PROGRAMS = {name: program(number, rows) for number, (name, rows) in enumerate({"a": 1, "b": 2, "c": 2, "d": 1}.items())}
WIDE = {name: program(number, rows) for number, (name, rows) in enumerate({"v": 3, "w": 4}.items())}
ALL = PROGRAMS | WIDE


TURNS = 4


@pytest.fixture(scope="module", autouse=True)
def few_turns() -> Iterator[None]:
    """So few that machines of a few steps come to the end of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_module, "TURNS", TURNS)
        yield


def bucket_of(name: str) -> int:
    return 0 if name in PROGRAMS else 1


class Gates(RuleBasedStateMachine):
    """Against a model of it: who runs with what, and who waits in which order."""

    @initialize(lists=st.booleans())
    def start(self, lists: bool) -> None:
        self.gate: Gate[str] = Gate(list(BUCKETS) if lists else iter(BUCKETS))
        self.running: dict[str, tuple[str, Slot]] = {}  # request: program, slot
        self.waiting: dict[str, str] = {}  # in the order in which they came
        self.may_end: dict[str, bool] = {}
        self.number = 0
        self.entered = [0, 0]
        self.since: dict[str, int] = {}

    def held(self, bucket: int) -> set[str]:
        return {name for name, slot in self.running.values() if slot.bucket == bucket}

    def runs(self, request: str, name: str, slot: Slot) -> None:
        """Checks a slot that was given, and notes it."""
        assert slot.bucket == bucket_of(name)
        assert 1 <= slot.index <= BUCKETS[slot.bucket].slots
        for other, theirs in self.running.values():
            assert (theirs == slot) == (other == name)
        self.running[request] = name, slot
        self.entered[slot.bucket] += 1

    def may_run(self, name: str, ahead: list[str]) -> bool:
        """Whether a program may, given who waits before it in its bucket."""
        bucket = bucket_of(name)
        if ahead and self.entered[bucket] - self.since[ahead[0]] >= TURNS:
            return False
        return name in self.held(bucket) or (len(self.held(bucket)) < BUCKETS[bucket].slots and not ahead)

    def queue(self, bucket: int) -> list[str]:
        return [request for request, name in self.waiting.items() if bucket_of(name) == bucket]

    def admits(self, admitted: list[tuple[str, Slot]]) -> None:
        """Checks who was let in, of those who wait."""
        slots = {request.removeprefix("request "): slot for request, slot in admitted}
        assert len(slots) == len(admitted)
        for bucket in range(len(BUCKETS)):
            ahead: list[str] = []
            for request in self.queue(bucket):
                name = self.waiting[request]
                assert (request in slots) == self.may_run(name, ahead)
                if request in slots:
                    del self.waiting[request]
                    self.runs(request, name, slots.pop(request))
                else:
                    ahead.append(request)
        assert not slots

    @rule(name=st.sampled_from(sorted(ALL)), may_end=st.booleans())
    def enter(self, name: str, may_end: bool) -> None:
        self.number += 1
        request = f"r{self.number}"
        bucket = bucket_of(name)
        expected = self.may_run(name, self.queue(bucket))
        # Another object that is equal, as each request brings its own.
        found = self.gate.enter(request, f"request {request}", program_again(name), may_end=may_end)
        self.may_end[request] = may_end
        assert (found is not None) == expected
        if found is not None:
            self.runs(request, name, found)
        else:
            self.waiting[request] = name
            self.since[request] = self.entered[bucket]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        self.take_away(request)

    def take_away(self, request: str) -> None:
        del self.running[request]
        admitted = self.gate.leave(request)
        assert not self.gate.may_end(request)
        self.admits(admitted)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Some of those who wait are aborted, among names that never did."""
        names = data.draw(st.lists(st.sampled_from([*self.waiting, *self.running, "nobody"]), max_size=3))
        gone, admitted = self.gate.drop(names)
        expected = [request for request in self.waiting if request in names]
        assert sorted(gone) == sorted(f"request {request}" for request in expected)
        for request in expected:
            del self.waiting[request]
        self.admits(admitted)

    @rule()
    def drop_all(self) -> None:
        gone, admitted = self.gate.drop(None)
        assert sorted(gone) == sorted(f"request {request}" for request in self.waiting)
        assert not admitted
        self.waiting.clear()

    @rule()
    def leave_what_never_came(self) -> None:
        assert self.gate.leave("nobody") == []

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_what_waits(self, data: st.DataObject) -> None:
        assert self.gate.leave(data.draw(st.sampled_from(sorted(self.waiting)))) == []

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "gate"):
            return
        assert self.gate.slots_in_use == len({slot for _, slot in self.running.values()})
        assert self.gate.waiting == len(self.waiting)
        for request, may_end in self.may_end.items():
            assert self.gate.may_end(request) == (may_end and request in self.running)

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        for bucket in range(len(BUCKETS)) if hasattr(self, "gate") else ():
            queue = self.queue(bucket)
            for place, request in enumerate(queue):
                assert not self.may_run(self.waiting[request], queue[:place])

    def teardown(self) -> None:
        """No leak: all end, those too who waited, each after those who came before it."""
        if not hasattr(self, "gate"):
            return
        while self.running:
            self.take_away(next(iter(self.running)))
        assert not self.waiting
        assert self.gate.slots_in_use == self.gate.waiting == 0


def program_again(name: str) -> Program:
    number = sorted(PROGRAMS).index(name) if name in PROGRAMS else sorted(WIDE).index(name)
    made = program(number, ALL[name].rows)
    assert made == ALL[name]
    return made


TestGates = Gates.TestCase
TestGates.settings = settings(max_examples=100, stateful_step_count=40)


# ------------------------------------------------------------------------------------------- by hand


def gate_of(*buckets: Bucket) -> Gate[str]:
    return Gate(buckets or (Bucket(1, 2),))


def enter(gate: Gate[str], *requests: str) -> list[Slot | None]:
    """Requests whose first letter is their program."""
    return [gate.enter(request, request, ALL[request[0]], may_end=False) for request in requests]


def test_one_that_waits_gets_its_slot_though_others_go_on_joining() -> None:
    """Some may go first, since joining takes no slot from anybody; then it is the turn of the one that waits."""
    gate = gate_of()
    assert enter(gate, "a0", "b1") == [Slot(0, 1), None]
    for number in range(1, TURNS + 1):
        assert enter(gate, f"a{number}") == [Slot(0, 1)]
        assert gate.leave(f"a{number - 1}") == []
    assert enter(gate, "a9") == [None]
    assert gate.leave(f"a{TURNS}") == [("b1", Slot(0, 1))]
    assert gate.leave("b1") == [("a9", Slot(0, 1))]


def test_who_waits_behind_one_that_is_given_up_goes_on() -> None:
    gate = gate_of()
    enter(gate, "a0", "b1", *(f"a{number}" for number in range(1, TURNS + 1)))
    assert enter(gate, "a9", "c1") == [None, None]
    assert gate.drop(["b1"]) == (["b1"], [("a9", Slot(0, 1))])


def test_the_same_program_twice_among_those_that_wait() -> None:
    gate = gate_of()
    assert enter(gate, "a1", "b1", "c1", "b2") == [Slot(0, 1), None, None, None]
    assert gate.leave("a1") == [("b1", Slot(0, 1)), ("b2", Slot(0, 1))]
    assert gate.leave("b1") == []
    assert gate.leave("b2") == [("c1", Slot(0, 1))]


def test_who_waits_for_a_wide_slot_holds_nobody_else_up() -> None:
    gate = gate_of(Bucket(1, 2), Bucket(1, 4))
    assert enter(gate, "v1", "w1", "a1", "b1") == [Slot(1, 1), None, Slot(0, 1), None]
    assert gate.leave("a1") == [("b1", Slot(0, 1))]
    assert gate.leave("v1") == [("w1", Slot(1, 1))]


def test_one_that_is_dropped_is_not_let_in_later() -> None:
    gate = gate_of()
    enter(gate, "a1", "b1", "c1")
    assert gate.drop({"b1"}) == (["b1"], [])
    assert gate.leave("a1") == [("c1", Slot(0, 1))]
    assert gate.leave("c1") == []
    assert gate.slots_in_use == gate.waiting == 0


def test_one_that_is_wider_than_every_slot_is_no_request() -> None:
    with pytest.raises(ValueError, match="no slot holds 3 rows"):
        enter(gate_of(), "v1")


def test_a_slot_that_is_free_is_given_with_what_is_in_it() -> None:
    """So that a program that comes back is not loaded again: the worker has it by its slot."""
    gate = gate_of(Bucket(2, 2))
    first: Any = enter(gate, "a1", "b1")
    gate.leave("a1")
    gate.leave("b1")
    assert enter(gate, "b2", "a2") == [first[1], first[0]]
