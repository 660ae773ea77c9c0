"""What was read of running requests and has not gone to the front end: kept beside the scheduler until it can go.

A step of a prompt that comes in chunks has no output, and neither has one that was preempted while it ran.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_Rows = NDArray[np.float64]


@dataclass(slots=True)
class Outbox:
    """Readings by request, in the order of their steps."""

    _rows: dict[str, list[_Rows]] = field(default_factory=dict)
    _stops: set[str] = field(default_factory=set)

    def put(self, reads: Mapping[str, _Rows], stops: Iterable[str]) -> None:
        """Adds what a step has read ``[n, 2 + W]``, and the requests that a trigger ends with their next output."""
        for name, rows in reads.items():
            self._rows.setdefault(name, []).append(rows)
        self._stops.update(stops)

    def stops(self, name: str) -> bool:
        """Whether a trigger ends a request."""
        return name in self._stops

    def take(self, name: str) -> _Rows | None:
        """Takes what a request has; None where it has nothing."""
        rows = self._rows.pop(name, None)
        if not rows:
            return None
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def drop(self, name: str) -> None:
        """Forgets a request that has ended."""
        self._rows.pop(name, None)
        self._stops.discard(name)
