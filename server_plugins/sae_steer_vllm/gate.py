"""Which request holds a slot: beside the scheduler, the one place of an engine that sees all of its requests.

A request whose program finds no slot waits outside the scheduler's queue, and enters it when a slot is free. It keeps
its slot until it ends, also while it is preempted: it comes back before anything that waits here would run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sae_steer.program import Program
from sae_steer.slots import Bucket, Slot, SlotPool

_Request = TypeVar("_Request")


@dataclass(slots=True)
class _Held:
    """A request in the scheduler."""

    digest: str
    may_end: bool


@dataclass(slots=True)
class _Parked(Generic[_Request]):
    """A request that waits for a slot."""

    name: str
    request: _Request
    program: Program
    may_end: bool


@dataclass(slots=True)
class Gate(Generic[_Request]):
    """Gives slots to requests.

    Args:
        buckets: The slots.
    """

    buckets: Iterable[Bucket]
    _pool: SlotPool = field(init=False)
    _held: dict[str, _Held] = field(init=False, default_factory=dict)
    _parked: list[_Parked[_Request]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._pool = SlotPool(list(self.buckets))

    @property
    def slots_in_use(self) -> int:
        """Slots that a request holds."""
        return self._pool.in_use

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._parked)

    def enter(self, name: str, request: _Request, program: Program, *, may_end: bool) -> Slot | None:
        """Takes a slot for a request, or has it wait.

        Args:
            name: The request's id.
            request: What :meth:`leave` gives back once it may run.
            program: What it asks.
            may_end: Whether the front end may end it by itself (stop texts), and so needs its sums with every output.

        Returns:
            The slot; None where it must wait.
        """
        # While somebody waits no slot of that width is free: only who shares one that is in use goes first.
        found = self._pool.acquire(program.digest, program.rows)
        if found is None:
            self._parked.append(_Parked(name, request, program, may_end))
            return None
        self._held[name] = _Held(program.digest, may_end)
        return found[0]

    def leave(self, name: str) -> list[tuple[_Request, Slot]]:
        """Gives a request's slot back; returns the requests that may run now, in the order in which they came."""
        held = self._held.pop(name, None)
        if held is None:
            return []
        self._pool.release(held.digest)
        return list(self._admit())

    def _admit(self) -> Iterable[tuple[_Request, Slot]]:
        parked, self._parked = self._parked, []
        for waiting in parked:
            slot = self.enter(waiting.name, waiting.request, waiting.program, may_end=waiting.may_end)
            if slot is not None:
                yield waiting.request, slot

    def drop(self, names: Iterable[str] | None) -> list[_Request]:
        """Takes requests out that wait here; ``None`` = all. Returns those that did."""
        wanted = None if names is None else set(names)
        gone = [p for p in self._parked if wanted is None or p.name in wanted]
        self._parked = [p for p in self._parked if p not in gone]
        return [p.request for p in gone]

    def may_end(self, name: str) -> bool:
        """Whether the front end may end a request by itself."""
        held = self._held.get(name)
        return held is not None and held.may_end
