"""Who gets a slot next: steered requests wait in the order in which they came.

Strictly in order: a later request never overtakes, not even one whose program has a slot already, because a popular
program could then keep the slot, and whoever waits for it, for ever.
"""

import asyncio
import logging
from collections import deque
from typing import Protocol

from sae_steer.errors import EngineDown, RunFailed, SteerError
from sae_steer.program import Program
from sae_steer.runtime import Runtime
from sae_steer.slots import Slot

logger = logging.getLogger(__name__)


class SlotMetrics(Protocol):
    """What admission tells the metrics."""

    def slots(self, in_use: int) -> None:
        """Slots that are held."""

    def waiting(self, n: int) -> None:
        """Requests that wait for a slot."""


class Admission:
    """Hands out the runtime's slots. Everything here runs in the event loop.

    Args:
        runtime: Holds the slots.
        metrics: Told of every change.
    """

    def __init__(self, runtime: Runtime, metrics: SlotMetrics | None) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._queue: deque[tuple[Program, asyncio.Future[Slot]]] = deque()

    async def acquire(self, program: Program) -> Slot:
        """Waits for a slot. Whoever gets one owes a :meth:`release`; who is cancelled while waiting owes nothing."""
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._queue.append((program, future))
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(program)  # it was served and cancelled in the same turn of the loop
            else:
                future.cancel()
                self._serve()  # whoever stood behind may fit
            raise

    def release(self, program: Program) -> None:
        """Gives a slot back and serves who waits."""
        self._runtime.release(program)
        self._serve()

    def refuse_waiting(self, reason: str) -> None:
        """Ends the wait of all: the engine is down."""
        for _, future in self._queue:
            if not future.done():
                future.set_exception(EngineDown(reason))
        self._serve()

    def _serve(self) -> None:
        """Serves from the front for as long as there are slots."""
        while self._queue:
            program, future = self._queue[0]
            if not future.done() and not self._try(program, future):
                break
            self._queue.popleft()
        if self._metrics is not None:
            self._metrics.slots(self._runtime.slots_in_use)
            self._metrics.waiting(sum(not future.done() for _, future in self._queue))

    def _try(self, program: Program, future: asyncio.Future[Slot]) -> bool:
        """Whether the request was answered: with a slot, or with why it can have none."""
        try:
            slot = self._runtime.acquire(program)
        except SteerError as error:
            future.set_exception(error)
            return True
        except (OSError, MemoryError, RuntimeError) as error:
            # Its rows could not be loaded. Whoever stands behind must not wait for ever for that.
            logger.exception("a program could not be loaded")
            future.set_exception(RunFailed(f"The program could not be loaded ({type(error).__name__})."))
            return True
        if slot is None:
            return False
        future.set_result(slot)
        return True
