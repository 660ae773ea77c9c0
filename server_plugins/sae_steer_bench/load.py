"""Requests over HTTP as a load: how many at once or how often, and who sends them."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from sae_steer_bench.records import LoadPlan
from sae_steer_bench.samples import Batch

_FIRST_ID = 16  # below it, vocabularies keep their special tokens


@dataclass(frozen=True, slots=True)
class Address:
    """A server under load.

    Args:
        url: Without ``/v1``.
        model: What requests call its model.
    """

    url: str
    model: str


@dataclass(frozen=True, slots=True)
class Work:
    """The requests of one measurement.

    Args:
        bodies: The field ``steering`` of each request, in turn; None = it has none.
        requests: How many there are.
        prompt_tokens: Token ids in each prompt.
        output_tokens: Completion tokens of each; none ends earlier.
        vocabulary: Prompts are made of ids below it.
        seed: Of the prompts: no two measurements share one, so no prefix cache helps one.
        arrivals: Of arrival times: the cases of a round share them, so that their ratios are not those of two bursts.
    """

    bodies: Sequence[dict[str, Any] | None]
    requests: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: int
    seed: str
    arrivals: str = ""

    def prompts(self) -> list[list[int]]:
        """``[requests, prompt_tokens]`` random token ids."""
        chance = random.Random(self.seed)
        return [
            [chance.randrange(_FIRST_ID, self.vocabulary) for _ in range(self.prompt_tokens)]
            for _ in range(self.requests)
        ]

    def starts(self, rate: float | None) -> list[float]:
        """``[requests]`` seconds from now to each: a Poisson process of ``rate`` a second; None = all at once."""
        if rate is None:
            return [0.0] * self.requests
        chance = random.Random(self.arrivals)
        return list(accumulate((chance.expovariate(rate) for _ in range(self.requests - 1)), initial=0.0))


class Generator(AbstractContextManager["Generator"], Protocol):
    """Sends requests."""

    def obstacle(self, address: Address, bodies: Sequence[dict[str, Any] | None]) -> str | None:
        """Why it cannot send requests with these bodies to a server; None = it can."""
        ...

    def run(self, address: Address, work: Work, load: LoadPlan) -> Batch:
        """Sends the requests and waits for the answers; raises :class:`LoadFailed` where one is not answered."""
        ...
