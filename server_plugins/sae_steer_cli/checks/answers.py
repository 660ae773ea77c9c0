"""Answers, and how far apart two of them are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_steer_http.client import BadAnswer

LEAST_BOUND = 0.05
"""Log-probabilities this close are never held against a server: a batch of another shape rounds that much in bf16."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Args:
        text: Its text.
        logprob: Its log-probability.
        top: The likeliest tokens in its place, by their text.
    """

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a completion, with what its response says.

    Args:
        text: The text.
        tokens: Its tokens; None where the server gives no log-probabilities.
        prompt_ids: Token ids of the prompt; None where the server does not give them.
        ids: Token ids of the text, likewise.
        applied: What steering did; None = the choice says nothing of it.
        program: Content hash of what steered it; None = the response says nothing of it.
        prompt_tokens: Tokens of the prompt.
        cached: Those of them that came from the prefix cache; None = the server does not say.
    """

    text: str
    tokens: Sequence[Token] | None
    prompt_ids: list[int] | None
    ids: list[int] | None
    applied: dict[str, Any] | None
    program: str | None
    prompt_tokens: int
    cached: int | None

    @property
    def fired(self) -> int:
        """How often an edit changed a feature."""
        return int(self.applied["fired"]) if self.applied is not None else 0

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> "Answer":
        """Reads the first choice of a response; raises :class:`BadAnswer`."""
        choice = get(reply, "choices", 0)
        logprobs = choice.get("logprobs")
        usage = reply.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        return cls(
            text=str(get(choice, "text")),
            tokens=_tokens(logprobs) if logprobs else None,
            prompt_ids=choice.get("prompt_token_ids"),
            ids=choice.get("token_ids"),
            applied=applied_of(choice),
            program=program_of(reply),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached=details.get("cached_tokens"),
        )


def get(value: Any, *path: str | int) -> Any:
    """A part of a response by its path; raises :class:`BadAnswer` with the path where there is none."""
    for i, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[: i + 1])
            raise BadAnswer(f"the answer has no {where.removeprefix('.')}") from None
    return value


def applied_of(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    """What steering did to a choice; None where it does not say. Raises :class:`BadAnswer`."""
    block = choice.get("steering")
    if block is None:
        return None
    get(block, "applied", "fired")
    applied: dict[str, Any] = block["applied"]
    return applied


def program_of(reply: Mapping[str, Any]) -> str | None:
    """Content hash of what steered a response, or an event of a stream; None where it does not say."""
    block = reply.get("steering")
    return str(get(block, "program")) if block is not None else None


def _tokens(logprobs: Mapping[str, Any]) -> list[Token]:
    texts, numbers = get(logprobs, "tokens"), get(logprobs, "token_logprobs")
    tops = logprobs.get("top_logprobs") or [{}] * len(texts)
    return [
        Token(str(text), float(number), dict(top or {})) for text, number, top in zip(texts, numbers, tops, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far apart two answers to one prompt are.

    Args:
        at: The first token (or character, without log-probabilities) that differs; None = the texts are the same.
        gap: By how much each answer preferred its own token there over the other's; infinite = nobody knows.
        largest: Largest difference of log-probabilities of the tokens before; None = the server gives none.
    """

    at: int | None
    gap: float
    largest: float | None

    @property
    def noise(self) -> float:
        """The least bound within which this difference would be."""
        return max(self.largest or 0.0, self.gap / 2 if self.at is not None else 0.0)

    def within(self, bound: float) -> bool:
        """Whether rounding explains it that moves a log-probability by at most ``bound``: a tie may fall either way."""
        return self.noise <= bound

    def __str__(self) -> str:
        said = "the same text" if self.at is None else f"another text from place {self.at} on"
        if self.at is not None and math.isfinite(self.gap):
            said += f" (preferring its own token there by {self.gap:.2g})"
        if self.largest is None:
            return said
        return f"{said}, log-probabilities " + (
            "equal to the bit" if self.largest == 0 else f"apart by at most {self.largest:.2g}"
        )


def compare(one: Answer, other: Answer) -> Difference:
    """Compares two answers to one prompt."""
    if one.tokens is None or other.tokens is None:
        return Difference(_first([*one.text], [*other.text]), math.inf, None)
    a, b = one.tokens, other.tokens
    at = _first([token.text for token in a], [token.text for token in b])
    if at is None and one.text != other.text:  # tokens of one text, such as parts of a character
        return Difference(0, math.inf, None)
    same = zip(a[:at], b[:at], strict=True)
    largest = max((abs(x.logprob - y.logprob) for x, y in same), default=0.0)
    gap = math.inf
    if at is not None and at < min(len(a), len(b)):
        x, y = a[at], b[at]
        gap = max(x.logprob - x.top.get(y.text, -math.inf), y.logprob - y.top.get(x.text, -math.inf))
    return Difference(at, gap, largest)


def _first(one: list[str], other: list[str]) -> int | None:
    """The first place where two lists differ."""
    if one == other:
        return None
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
