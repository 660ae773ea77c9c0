"""Which request holds a slot: beside the scheduler, the one place of an engine that sees all of its requests.

A request whose program finds no slot waits outside the scheduler's queue, and enters it when a slot is free. It keeps
its slot until it ends, also while it is preempted: it comes back before anything that waits here would run.

A request whose program has a slot already shares it and need not wait, which costs those who do nothing at first; but a
program that is always asked for would keep its slot for ever. So :data:`TURNS` requests may go first, and then none.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sae_steer.program import Program
from sae_steer.slots import Bucket, Slot, SlotPool
from sae_steer_vllm.outbox import Outbox

_Request = TypeVar("_Request")

TURNS = 64
"""Requests of a bucket that enter after one began to wait there and before it is the next."""


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
    since: int = 0  # requests that had entered when it came


@dataclass(slots=True)
class Gate(Generic[_Request]):
    """Gives slots to requests.

    Args:
        buckets: The slots.
    """

    buckets: Iterable[Bucket]
    outbox: Outbox = field(init=False, default_factory=Outbox)
    _pool: SlotPool = field(init=False)
    _held: dict[str, _Held] = field(init=False, default_factory=dict)
    _parked: list[list[_Parked[_Request]]] = field(init=False)  # for each bucket, in the order in which they came
    _entered: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._pool = SlotPool(list(self.buckets))
        self._parked = [[] for _ in self._pool.buckets]
        self._entered = [0 for _ in self._pool.buckets]

    @property
    def slots_in_use(self) -> int:
        """Slots that a request holds."""
        return self._pool.in_use

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(map(len, self._parked))

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
        bucket = self._pool.bucket_for(program.rows)
        asks = _Parked(name, request, program, may_end, self._entered[bucket])
        slot = self._try(bucket, asks)
        if slot is None:
            self._parked[bucket].append(asks)
        return slot

    def _try(self, bucket: int, asks: _Parked[_Request]) -> Slot | None:
        ahead = self._parked[bucket]
        if ahead and self._entered[bucket] - ahead[0].since >= TURNS:
            return None
        # While somebody waits no slot of that width is free: only who shares one that is in use goes first.
        found = self._pool.acquire(asks.program.digest, asks.program.rows)
        if found is None:
            return None
        self._entered[bucket] += 1
        self._held[asks.name] = _Held(asks.program.digest, asks.may_end)
        return found[0]

    def leave(self, name: str) -> list[tuple[_Request, Slot]]:
        """Gives a request's slot back; returns the requests that may run now, in the order in which they came."""
        self.outbox.drop(name)
        held = self._held.pop(name, None)
        if held is None:
            return []
        self._pool.release(held.digest)
        return self._admit()

    def _admit(self) -> list[tuple[_Request, Slot]]:
        admitted: list[tuple[_Request, Slot]] = []
        for bucket, parked in enumerate(self._parked):
            self._parked[bucket] = []
            for waiting in parked:
                slot = self._try(bucket, waiting)
                if slot is None:
                    self._parked[bucket].append(waiting)
                else:
                    admitted.append((waiting.request, slot))
        return admitted

    def drop(self, names: Iterable[str] | None) -> tuple[list[_Request], list[tuple[_Request, Slot]]]:
        """Takes requests out that wait here; ``None`` = all.

        Returns:
            Those that did, and what may run now because none of them is in the way.
        """
        wanted = None if names is None else set(names)
        gone: list[_Request] = []
        for bucket, parked in enumerate(self._parked):
            taken = [p for p in parked if wanted is None or p.name in wanted]
            self._parked[bucket] = [p for p in parked if p not in taken]
            gone += [p.request for p in taken]
        return gone, self._admit() if gone else []

    def may_end(self, name: str) -> bool:
        """Whether the front end may end a request by itself."""
        held = self._held.get(name)
        return held is not None and held.may_end
