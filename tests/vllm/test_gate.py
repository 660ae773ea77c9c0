"""The gate: no two programs in one slot, nobody waits without a reason, nobody is overtaken, nobody is forgotten."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.sites import Site
from sae_steer.slots import Bucket, Slot
from sae_steer_vllm.gate import Gate

BUCKETS = (Bucket(2, 2), Bucket(1, 4))
SITE = Site.parse("resid_post.1")


def program(number: int, rows: int) -> Program:
    edits = tuple(Row("sha256:a", i, "add", shift=float(number), selector=0) for i in range(rows))
    return Program((SiteProgram(SITE, edits),), (Selector(Phase.ALL),))


PROGRAMS = {name: program(number, rows) for number, (name, rows) in enumerate({"a": 1, "b": 2, "c": 2, "d": 1}.items())}
WIDE = {name: program(number, rows) for number, (name, rows) in enumerate({"v": 3, "w": 4}.items())}
ALL = PROGRAMS | WIDE


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

    def held(self, bucket: int) -> set[str]:
        return {name for name, slot in self.running.values() if slot.bucket == bucket}

    def runs(self, request: str, name: str, slot: Slot) -> None:
        """Checks a slot that was given, and notes it."""
        assert slot.bucket == bucket_of(name)
        assert 1 <= slot.index <= BUCKETS[slot.bucket].slots
        for other, theirs in self.running.values():
            assert (theirs == slot) == (other == name)
        self.running[request] = name, slot

    @rule(name=st.sampled_from(sorted(ALL)), may_end=st.booleans())
    def enter(self, name: str, may_end: bool) -> None:
        self.number += 1
        request = f"r{self.number}"
        bucket = bucket_of(name)
        joins = name in self.held(bucket)
        free = len(self.held(bucket)) < BUCKETS[bucket].slots
        behind = any(bucket_of(other) == bucket for other in self.waiting.values())
        # Another object that is equal, as each request brings its own.
        found = self.gate.enter(request, f"request {request}", program_again(name), may_end=may_end)
        self.may_end[request] = may_end
        assert (found is not None) == (joins or (free and not behind))
        if found is not None:
            self.runs(request, name, found)
        else:
            self.waiting[request] = name

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        self.take_away(request)

    def take_away(self, request: str) -> None:
        del self.running[request]
        admitted = [(name.removeprefix("request "), slot) for name, slot in self.gate.leave(request)]
        assert not self.gate.may_end(request)
        order = list(self.waiting)
        assert [order.index(name) for name, _ in admitted] == sorted(order.index(name) for name, _ in admitted)
        for name, slot in admitted:
            joins = self.waiting[name] in self.held(slot.bucket)
            before = [n for n in self.waiting if bucket_of(self.waiting[n]) == slot.bucket]
            assert joins or before[0] == name  # first of its bucket
            self.runs(name, self.waiting.pop(name), slot)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Some of those who wait are aborted, among names that never did."""
        names = data.draw(st.lists(st.sampled_from([*self.waiting, *self.running, "nobody"]), max_size=3))
        gone = self.gate.drop(names)
        expected = [request for request in self.waiting if request in names]
        assert gone == [f"request {request}" for request in expected]
        for request in expected:
            del self.waiting[request]

    @rule()
    def drop_all(self) -> None:
        assert self.gate.drop(None) == [f"request {request}" for request in self.waiting]
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
        for name in getattr(self, "waiting", {}).values():
            bucket = bucket_of(name)
            assert name not in self.held(bucket)
            assert len(self.held(bucket)) == BUCKETS[bucket].slots

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
    """Who joins takes no slot from anybody; once its holders have ended, the first that waits is next."""
    gate = gate_of()
    assert enter(gate, "a1", "b1") == [Slot(0, 1), None]
    for number in range(2, 20):
        assert enter(gate, f"a{number}") == [Slot(0, 1)]
        assert gate.leave(f"a{number - 1}") == []
    assert gate.leave("a19") == [("b1", Slot(0, 1))]
    assert enter(gate, "a20") == [None]


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
    assert gate.drop({"b1"}) == ["b1"]
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
