"""What a path answers, and whether that is what the definition says."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tests.conformance.asks import Case

# What float32 may differ by from float64. Through the six layers of the model the largest difference seen, on any path,
# was 7e-6 in a log-probability, 2e-6 of an activation and 6e-7 in a dose; other processors add in another order.
LOGPROB = 1e-4
ACTIVATION = 5e-5
"""Of values up to 1 this much, of greater ones this part."""
DOSE = 1e-5
CLOSEST = 2e-3
"""Smallest distance between the two best logits at which "the same token" is more than luck."""


@dataclass(frozen=True)
class Asked:
    """A request as it is sent; plain data.

    Args:
        prompt: Token ids.
        steering: The field ``steering``.
        tokens: Completion tokens.
        choices: ``n``.
        fails: Whether it must end with an error.
    """

    prompt: list[int]
    steering: dict[str, Any] | None
    tokens: int
    choices: int
    fails: bool


@dataclass(frozen=True)
class Choice:
    """What came back for one choice.

    Args:
        tokens: Ids of the completion.
        logprobs: Their log-probabilities.
        applied: The ``applied`` block.
        read: The ``readings`` and ``triggers`` beside it.
        error: Code of the error that it ended with.
        cached: Tokens of the prompt that came from a prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    applied: dict[str, Any] | None = None
    error: str | None = None
    cached: int = 0
    read: dict[str, Any] | None = None


@dataclass(frozen=True)
class Expected:
    """What the definition says.

    Args:
        tokens: As in :class:`Choice`.
        logprobs: As in :class:`Choice`.
        margin: The smallest distance between the two best logits.
        plain: The tokens of the same request without steering.
        error: Code of the error.
        applied: From the number of cached prompt tokens to the ``applied`` block.
        cached: What vLLM must take from its cache.
        read: As in :class:`Choice`; None = nothing was asked.
    """

    tokens: list[int]
    logprobs: list[float]
    margin: float
    plain: list[int]
    error: str | None
    applied: Callable[[int], dict[str, Any] | None]
    cached: int | None
    read: dict[str, Any] | None = None


class Path(Protocol):
    """A way to run a model."""

    caches: bool
    """Whether it has vLLM's prefix cache, of the cases' block size."""

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """Answers requests.

        Args:
            waves: The requests.
            wrong: The wrong variant that is switched on meanwhile.
            cold: Whether the prefix cache is emptied first.

        Returns:
            For each wave and request, its choices.
        """
        ...


def read_part(block: dict[str, Any]) -> dict[str, Any] | None:
    """What was read, of the block of a choice; None where nothing was asked."""
    return {key: block[key] for key in ("readings", "triggers")} if "readings" in block else None


def faults(
    case: Case,
    expected: Sequence[Sequence[Expected]],
    got: Sequence[Sequence[Sequence[Choice]]],
    *,
    caches: bool,
) -> list[str]:
    """All that differs; empty where a path is right."""
    found: list[str] = []
    for w, (wave, wants, haves) in enumerate(zip(case.waves, expected, got, strict=True)):
        for i, (ask, want, choices) in enumerate(zip(wave, wants, haves, strict=True)):
            if len(choices) != ask.choices:
                found.append(f"wave {w}, request {i}: {len(choices)} choices")
            for choice in choices:
                found += [f"wave {w}, request {i}: {fault}" for fault in _faults(want, choice, caches=caches)]
    return found


def _faults(want: Expected, have: Choice, *, caches: bool) -> list[str]:
    if have.error != want.error:
        return [f"error {have.error}, not {want.error}"]
    if want.error is not None:
        return []
    if have.tokens != want.tokens:
        return [f"tokens {have.tokens}, not {want.tokens}"]
    found: list[str] = []
    worst = max(abs(a - b) for a, b in zip(have.logprobs, want.logprobs, strict=True))
    if worst > LOGPROB:
        found.append(f"a log-probability is off by {worst:.2g}")
    if caches and want.cached is not None and have.cached != want.cached:
        found.append(f"{have.cached} prompt tokens from the cache, not {want.cached}")
    found += _differences("applied", have.applied, want.applied(have.cached))
    return found + _differences("read", *(_without_texts(read) for read in (have.read, want.read)))


def _without_texts(read: dict[str, Any] | None) -> dict[str, Any] | None:
    """Readings without the texts of their tokens, which ``attach`` cannot tell, and which follow from the ids."""
    if read is None:
        return None
    readings = [{k: v for k, v in reading.items() if k != "text"} for reading in read["readings"]]
    return {"readings": readings, "triggers": read["triggers"]}


def _differences(path: str, have: Any, want: Any) -> list[str]:
    """Where two ``applied`` blocks differ."""
    if isinstance(want, dict) and isinstance(have, dict) and want.keys() == have.keys():
        return [fault for key in want for fault in _differences(f"{path}.{key}", have[key], want[key])]
    if isinstance(want, list) and isinstance(have, list) and len(want) == len(have):
        return [
            fault
            for i, (a, b) in enumerate(zip(have, want, strict=True))
            for fault in _differences(f"{path}[{i}]", a, b)
        ]
    if isinstance(want, float) and isinstance(have, float):
        allowed = DOSE if ".dose." in path else ACTIVATION
        same = math.isclose(have, want, rel_tol=allowed, abs_tol=allowed)
    else:
        same = have == want and type(have) is type(want)
    return [] if same else [f"{path} is {have!r}, not {want!r}"]
