"""The server under test, with what the checks have found out about it so far."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from sae_steer_cli.checks.answers import LEAST_BOUND, Answer, Difference, compare
from sae_steer_http.client import Server

TOKENS = 16
"""Tokens of an answer."""
PROMPT_TOKENS = 640
"""Tokens of a prompt where the context has room: five blocks of the longest usual kind."""
ALIKE = 8
"""Tokens at the start of any two prompts that may be the same; a smaller number of cached ones tells nothing."""
_WHO = (
    "Anna",
    "The baker",
    "Tom",
    "My sister",
    "The captain",
    "A teacher",
    "Old Mary",
    "The farmer",
    "Ben",
    "A doctor",
)
_DID = ("carried", "found", "painted", "lost", "bought", "counted", "hid", "washed", "sold", "mended")
_WHAT = ("apples", "letters", "boats", "clocks", "flowers", "books", "stones", "lamps", "hats", "keys")
_KIND = ("red", "small", "old", "heavy", "bright", "broken", "green", "quiet", "wet", "new")
_WHERE = ("by the sea", "in the garden", "near the station", "at school", "under the bridge", "in the kitchen")


class Failed(Exception):
    """A check found a fault."""


class Skipped(Exception):
    """A check has nothing to look at on this server."""


@dataclass(frozen=True, slots=True)
class Edit:
    """The edit that the checks work with.

    Args:
        sae: Name of the SAE.
        feature: Number of the feature.
        value: What it is clamped to.
        units: What that is a multiple of.
    """

    sae: str
    feature: int
    value: float
    units: str = "raw"

    def steering(self, positions: object = "all") -> dict[str, Any]:
        """The field ``steering``."""
        edit = {"sae": self.sae, "features": [self.feature], "op": "clamp", "value": self.value, "units": self.units}
        return {"interventions": [edit | {"positions": positions}]}

    def __str__(self) -> str:
        units = {"raw": "", "reference_max": " times its recorded maximum", "residual_norm": " token lengths"}
        return f"feature {self.feature} of {self.sae!r} clamped to {self.value:g}{units[self.units]}"


@dataclass(slots=True)
class Subject:
    """The server under test.

    Args:
        server: Asks it.
        model: The model's name.
        tell: Is told what is being done.
        host: Which host it is.
        saes: The SAEs, as the server lists them.
        context: Tokens that a prompt with its answer may have; None = the server does not say.
        salts: Whether a request can be kept from the prefix cache with ``cache_salt``.
        logprobs: Whether the server gives log-probabilities.
        reports_cached: Whether it says how many prompt tokens it took from its prefix cache.
        bound: How far rounding alone moves log-probabilities here.
        edit: An edit that changes answers.
        other: The same feature clamped to another value, with another effect.
        reaches_cache: Whether edits of prompt tokens alone change answers: only then would text show a leak.
        chance: What prompts are made by.
    """

    server: Server
    model: str
    tell: Callable[[str], None]
    host: str = ""
    saes: list[dict[str, Any]] = field(default_factory=list)
    context: int | None = None
    salts: bool = False
    logprobs: bool = True
    reports_cached: bool = False
    bound: float = LEAST_BOUND
    edit: Edit | None = None
    other: Edit | None = None
    reaches_cache: bool = False
    chance: random.Random = field(default_factory=random.SystemRandom)
    _per_sentence: float = 0.0

    @property
    def chosen(self) -> Edit:
        """The edit, once it was found."""
        assert self.edit is not None  # the checks that use it need the one that finds it
        return self.edit

    def body(self, prompt: str | list[int], **more: Any) -> dict[str, Any]:
        """Body of a greedy completion."""
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        if self.logprobs:
            body["logprobs"] = 5
        if self.host == "vllm":
            body |= {"ignore_eos": True, "return_token_ids": True}
        return body | more

    def ask(
        self, prompt: str | list[int], steering: dict[str, Any] | None = None, *, cold: bool = False, **more: Any
    ) -> Answer:
        """An answer.

        Args:
            prompt: Text or token ids.
            steering: The field ``steering``; None = plain.
            cold: Keep it from the prefix cache, where there is one.
            more: Other fields of the body.

        Raises:
            Refused: It is an error.
            Failed: A steered answer does not say so, or a plain one says that it was steered.
        """
        if cold and self.salts:
            more["cache_salt"] = token_hex(16)
        if steering is not None:
            more["steering"] = steering
        answer = Answer.of(self.server.post("/v1/completions", self.body(prompt, **more)))
        if steering is not None and (answer.applied is None or answer.program is None):
            part = "choices[0].steering" if answer.applied is None else "steering.program"
            raise Failed(f"a request with `steering` was answered without {part}: it may not have been steered at all")
        if steering is None and (answer.applied is not None or answer.program is not None):
            raise Failed("a request without `steering` was answered as a steered one")
        return answer

    def steered(self, prompt: str | list[int], positions: object = "all", *, cold: bool = False, **more: Any) -> Answer:
        """An answer under the edit that was found."""
        return self.ask(prompt, self.chosen.steering(positions), cold=cold, **more)

    def same(self, one: Answer, other: Answer) -> bool:
        """Whether two answers are one, but for rounding."""
        return compare(one, other).within(self.bound)

    def require_same(self, one: Answer, other: Answer, what: str) -> Difference:
        """Raises :class:`Failed` where :meth:`same` is false; ``what`` says which answers."""
        difference = compare(one, other)
        if not difference.within(self.bound):
            raise Failed(f"{what}: {difference}")
        return difference

    def measure(self) -> None:
        """Finds out how many tokens a sentence has, for :meth:`prompt`."""
        self._per_sentence = self.ask(_prose(4, self.chance), max_tokens=1).prompt_tokens / 4 or 16.0

    def prompt(self) -> str:
        """A prompt of several blocks that no server has seen: it begins with random text."""
        tokens = PROMPT_TOKENS
        if self.context is not None:
            tokens = min(tokens, self.context - 8 * TOKENS)
        return _prose(max(1, int(tokens / self._per_sentence)), self.chance)

    def prompts(self) -> Iterator[str]:
        """A few of them: on one alone an edit may happen to change nothing."""
        return (self.prompt() for _ in range(8))


def _prose(sentences: int, chance: random.Random) -> str:
    parts = [
        f"{chance.choice(_WHO)} {chance.choice(_DID)} {chance.randint(2, 99)} {chance.choice(_KIND)} "
        f"{chance.choice(_WHAT)} {chance.choice(_WHERE)}."
        for _ in range(sentences)
    ]
    return " ".join([f"{chance.getrandbits(32):08x}.", *parts, "Then"])
