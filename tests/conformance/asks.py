"""The parts of which cases are made: requests, and what they ask in the field ``steering``."""

from dataclasses import dataclass
from typing import Any

from tests.conformance.catalog import CALIBRATION, SAE


@dataclass(frozen=True)
class Ask:
    """One request; greedy.

    Args:
        prompt: Name of a prompt.
        steering: The field ``steering``.
        tokens: Completion tokens.
        choices: ``n``, all of them greedy.
        first: Tokens of the prompt that are sent; None = all.
        after: The prompt comes behind the first request, with its answer, of this wave.
        cached: Tokens of the prompt that vLLM must take from its prefix cache; None = as many as it likes.
        fails: Code of the error that it must end with.
    """

    prompt: str
    steering: dict[str, Any] | None = None
    tokens: int = 12
    choices: int = 1
    first: int | None = None
    after: int | None = None
    cached: int | None = None
    fails: str | None = None


Wave = tuple[Ask, ...]


@dataclass(frozen=True)
class Case:
    """Requests and when they are sent.

    Args:
        name: Its name.
        kills: The wrong variants that must fail it.
        waves: The requests.
    """

    name: str
    kills: tuple[str, ...]
    waves: tuple[Wave, ...]


def edit(features: list[int], op: str, **more: Any) -> dict[str, Any]:
    """An intervention on features."""
    return {"sae": SAE, "features": features, "op": op, **more}


def vector(name: str, site: str, op: str, **more: Any) -> dict[str, Any]:
    """An intervention along a plain direction."""
    return {"site": site, "vector": name, "op": op, **more}


def asked(*interventions: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A field ``steering``."""
    return {"interventions": list(interventions), **more}


def single(name: str, kills: str, *interventions: dict[str, Any], prompt: str = "sea", **more: Any) -> Case:
    """A case of one request."""
    return Case(name, (kills,), ((Ask(prompt, asked(*interventions, **more)),),))


def clamp(feature: int, value: float = 40.0, **more: Any) -> dict[str, Any]:
    """A field ``steering`` that clamps a feature."""
    return asked(edit([feature], "clamp", value=value, **more))


def by_calibration(op: str, concept: str = "sea", **more: Any) -> dict[str, Any]:
    """An intervention on the features that the calibration chose for a concept."""
    return {"sae": SAE, "calibration": CALIBRATION, "concept": concept, "op": op, **more}


def reading(features: list[int], **more: Any) -> dict[str, Any]:
    """A reading of features."""
    return {"sae": SAE, "features": features, **more}


def reads(*readings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A field ``steering`` that reads, and perhaps edits too."""
    return {"readings": list(readings), **more}
