"""The token -> slot map of one step: filled once, shared by all sites."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sae_steer.report import Run
from sae_steer_kernels import TokenGroups


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a step's tokens that belongs to one request.

    Args:
        run: The request's steered run; None for tokens that nobody steers.
        start: Absolute position of its first token in the request.
        tokens: Token ids.
    """

    run: Run | None
    start: int
    tokens: Sequence[int]


@dataclass(slots=True)
class Placed:
    """Where a run's tokens lie in the step, for collecting what happened to them."""

    run: Run
    first: int
    positions: np.ndarray
    bits: np.ndarray
    tokens: np.ndarray


@dataclass(slots=True)
class StepMap:
    """Persistent buffers that say, for each token of the step, which slot and which selectors it has.

    Args:
        buckets: Number of slot buckets.
        device: Where the map lives.
        capacity: Tokens that fit before the buffers grow.
    """

    buckets: int
    device: torch.device
    capacity: int = 256
    slots: tuple[Tensor, ...] = field(init=False)
    bits: Tensor = field(init=False)
    groups: tuple[TokenGroups, ...] = field(init=False, default=())  # never grouped
    placed: list[Placed] = field(init=False, default_factory=list)
    tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._allocate(self.capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots = tuple(torch.zeros(capacity, dtype=torch.int32, device=self.device) for _ in range(self.buckets))
        self.bits = torch.zeros(capacity, dtype=torch.int32, device=self.device)

    def fill(self, spans: Sequence[Span]) -> None:
        """Lays out a step: ``spans`` in the order of the flattened ``[T]`` batch. Tokens beyond them have no slot."""
        self.clear()
        total = sum(len(span.tokens) for span in spans)
        if total > self.capacity:
            self._allocate(max(total, 2 * self.capacity))
        self.tokens = total
        slots = np.zeros((self.buckets, self.capacity), dtype=np.int32)
        bits = np.zeros(self.capacity, dtype=np.int32)
        first = 0
        for span in spans:
            count = len(span.tokens)
            run = span.run
            if run is not None and run.failure is None and count:
                positions = np.arange(span.start, span.start + count, dtype=np.int64)
                tokens = np.asarray(span.tokens, dtype=np.int64)
                held = run.program.bits(positions, tokens, run.prompt_length)
                if held.any():
                    slots[run.slot.bucket, first : first + count][held != 0] = run.slot.index
                    bits[first : first + count] = held
                    self.placed.append(Placed(run, first, positions, held, tokens))
            first += count
        if self.placed:
            for number in range(self.buckets):
                self.slots[number].copy_(torch.from_numpy(slots[number]))
            self.bits.copy_(torch.from_numpy(bits))

    def clear(self) -> None:
        """No token of the next step has a slot."""
        if self.placed:
            for slots in self.slots:
                slots.zero_()
        self.placed = []
        self.tokens = 0
