"""The plugin beside the API server or ``LLM``: from what a user asks to a program, from sums to a report."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from prometheus_client import REGISTRY

from sae_steer.capabilities import Capabilities
from sae_steer.catalog import Catalog
from sae_steer.compiler import compile_program
from sae_steer.errors import (
    LimitExceeded,
    ReadingsExceeded,
    RequestError,
    RunFailed,
    SchemaError,
    SteerError,
    Unsupported,
)
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.readings import Reader, TextOf
from sae_steer.report import applied_block
from sae_steer.runs import Sums
from sae_steer.schema import parse_steering
from sae_steer.sites import Site
from sae_steer.strict_json import loads
from sae_steer.token_texts import TokenTexts
from sae_steer.wire import parse, to_text
from sae_steer_http.block_metrics import BlockMetrics
from sae_steer_http.readings import ReadingBudget, check_reading_size
from sae_steer_vllm.channel import ASK, ERROR, PROGRAM, READS, RESERVED, SUMS, TICKET, new_ticket


class WorkerFailed(RunFailed):
    """A worker could not load a program."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # the worker's own


@cache
def block_metrics() -> BlockMetrics:
    """The plugin's counters beside vLLM's own, once a process."""
    return BlockMetrics(REGISTRY)


AT_ONCE = 64
"""Tokens that wait for one another: one by one, each would cost as much as all of them."""


@dataclass(slots=True)
class Collector:
    """What became of the engine's requests that one HTTP request was made into.

    Args:
        program: What steers them, compiled once for all of its prompts.
        budget: Counts what their answers read.
        limited: Whether the client said how many tokens it wants at most.
    """

    program: Program
    budget: ReadingBudget
    limited: bool = True
    done: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    running: dict[tuple[str, int], "Follow"] = field(default_factory=dict)
    failure: SteerError | None = None


@dataclass(slots=True)
class Follow:
    """A steered request, as the front end follows it.

    Args:
        program: What steers it.
        frontend: Knows the names.
        collector: Who wants to know, over HTTP.
        reader: What it has read; None = it reads nothing.
        text_of: Names tokens; None = this engine has no tokenizer.
        budget: Counts what its answer reads.
    """

    program: Program
    frontend: "Frontend"
    collector: Collector | None
    reader: Reader | None
    text_of: TextOf | None
    budget: ReadingBudget
    sums: Sums | None = None
    failure: SteerError | None = None
    waiting: list[bytes] = field(default_factory=list)
    """What was read and is not with the reader yet, in the order of its tokens: no worker reads a token twice."""
    held: int = 0
    """How many tokens that is."""

    @property
    def stopped(self) -> bool:
        """Whether a trigger has ended the answer."""
        return self.reader is not None and self.reader.stop is not None

    def register(self, request: str, index: int) -> None:
        """Says which choice of which of the engine's requests this is."""
        if self.collector is not None and self.reader is not None:
            self.collector.running[request, index] = self

    def new_readings(self) -> list[dict[str, Any]] | None:
        """For each reading, the tokens that were not told yet; None where none is told token by token."""
        self._settle()
        return self.reader.new(self.frontend.catalog.name_of, self.text_of) if self.reader is not None else None

    def take(self, payload: Mapping[str, Any]) -> None:
        """Takes over what came with an output."""
        if SUMS in payload:
            self.sums = Sums(self.program, np.frombuffer(payload[SUMS], dtype=np.float64))
            self.failure = self.failure or self.sums.failure
        if ERROR in payload:
            self.failure = WorkerFailed(*payload[ERROR])
        if READS in payload and self.reader is not None:
            self.waiting.append(payload[READS])
            self.held += len(payload[READS]) // (8 * (2 + self.reader.width))
            if self.held >= AT_ONCE or self.program.triggers:  # a trigger may not wait
                self._settle()

    def _settle(self) -> None:
        """Hands over to the reader what waits for it, and counts that."""
        waiting, self.waiting, self.held = self.waiting, [], 0
        reader = self.reader
        if reader is None or not waiting or self.failure is not None:
            return
        before, computed = reader.told, reader.computed
        rows = np.frombuffer(b"".join(waiting), dtype=np.float64).reshape(-1, 2 + reader.width)
        reader.take(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2:])
        try:
            self.budget.take(reader.told - before, reader.computed - computed)
            block_metrics().values(reader.told - before)
        except ReadingsExceeded as error:
            self.failure, self.reader = error, None
            if self.collector is not None:
                self.collector.failure = error

    def finish(self, request: str, index: int) -> dict[str, Any]:
        """The block of a choice that has ended, which the collector gets too."""
        self._settle()
        if self.failure is not None:
            block: dict[str, Any] = {"error": {"code": self.failure.code, "message": self.failure.message}}
            if self.collector is not None:
                self.collector.failure = self.failure
            return block
        tallies, touched = (self.sums.tallies(), self.sums.touched) if self.sums is not None else ([], 0)
        name_of = self.frontend.catalog.name_of
        block = {"applied": applied_block(tallies, touched, name_of)}
        if self.reader is not None:
            block |= self.reader.finish(name_of, self.text_of)
        block_metrics().choice(block)
        if self.collector is not None:
            self.collector.done[request, index] = block
        return block


@dataclass(frozen=True, slots=True)
class Frontend:
    """Compiles what requests ask.

    Args:
        catalog: What the names mean.
        capabilities: What can be honoured.
        limits: What the slots hold.
        sites: The places that are hooked.
        bos_token_id: The beginning-of-sequence token, for ``skip_bos``.
    """

    catalog: Catalog
    capabilities: Capabilities
    limits: Limits
    sites: tuple[Site, ...]
    bos_token_id: int | None
    _tickets: dict[str, Collector] = field(default_factory=dict)
    _texts: list[TokenTexts] = field(default_factory=list)

    @contextmanager
    def collecting(self, program: Program, *, limited: bool = True) -> Iterator[tuple[str, Collector]]:
        """Within the block, engine requests that ask with the ticket run ``program`` and tell the collector.

        A ticket is good in this process alone, and nobody can guess one.
        """
        ticket = new_ticket()
        self._tickets[ticket] = collector = Collector(program, ReadingBudget(self.limits), limited)
        try:
            yield ticket, collector
        finally:
            del self._tickets[ticket]

    def compile(self, asked: object) -> Program | None:
        """Compiles what ``extra_args`` carry: a JSON string, or (offline) an object.

        Raises:
            RequestError: It cannot be honoured.
        """
        if isinstance(asked, str):
            value = loads(asked.encode("utf-8", "surrogatepass"))
        elif isinstance(asked, Mapping):
            value = dict(asked)
        else:
            raise SchemaError("steering: this is not an object, nor one as a JSON string.", param="steering")
        return compile_program(
            parse_steering(value),
            self.catalog,
            self.capabilities,
            self.limits,
            sites=self.sites,
            bos_token_id=self.bos_token_id,
        )

    def follow(self, program: str, ticket: str | None, prompt_length: int = 1, tokenizer: Any = None) -> Follow:
        """Follows a request that is about to enter the engine, by what :func:`admit` gave it."""
        parsed, collector = parse(program), self._tickets.get(ticket or "")
        reader = Reader(parsed, prompt_length) if parsed.reads else None
        text_of = self._texts_of(tokenizer) if reader is not None and tokenizer is not None else None
        budget = collector.budget if collector is not None else ReadingBudget(self.limits)
        return Follow(parsed, self, collector, reader, text_of, budget)

    def _texts_of(self, tokenizer: Any) -> TextOf:
        if not self._texts:
            self._texts.append(TokenTexts(tokenizer))
        return self._texts[0].text

    def check_size(self, program: Program, ticket: object, told: "Told") -> None:
        """Raises :class:`LimitExceeded` for a request that would read more than its answer may hold."""
        collector = self._tickets.get(ticket) if isinstance(ticket, str) else None
        limited = collector is None or collector.limited
        most = told.max_tokens if limited else None
        try:
            check_reading_size(program, self.limits, [told.prompt_length], most, choices=told.choices)
        except LimitExceeded as error:
            if collector is not None:
                collector.failure = error  # vLLM's own answer would not say the code
            raise

    def ticketed(self, asked: object) -> Program | None:
        """The program of a ticket; None where it is none."""
        collector = self._tickets.get(asked) if isinstance(asked, str) else None
        return collector.program if collector is not None else None


@dataclass(frozen=True, slots=True)
class Told:
    """How long a request may become.

    Args:
        prompt_length: ``P``.
        max_tokens: Completion tokens.
        choices: ``n``.
    """

    prompt_length: int = 0
    max_tokens: int | None = None
    choices: int = 1


_UNKNOWN = Told()


def admit(frontend: Frontend | None, extra_args: dict[str, Any] | None, told: Told = _UNKNOWN) -> dict[str, Any] | None:
    """What the engine gets for a request's ``extra_args``.

    Args:
        frontend: None where the plugin is not configured.
        extra_args: As the user sent them.
        told: How long it may become.

    Raises:
        RequestError: Something is asked that cannot be honoured.
    """
    if not extra_args:
        return extra_args
    for key in RESERVED:
        if key in extra_args:
            raise RequestError(f"extra_args.{key} is the plugin's own. Ask in {ASK!r}.", param=key, code="reserved")
    if ASK not in extra_args:
        return extra_args
    if frontend is None:
        raise Unsupported(
            "steering: this engine was started without SAEs. Start it with --additional-config "
            "'{\"sae_steer\": ...}' (`sae-steer vllm-args` prints it).",
            param="steering",
        )
    asked = extra_args[ASK]
    rest = {key: value for key, value in extra_args.items() if key != ASK}
    ticketed = frontend.ticketed(asked)
    program = ticketed if ticketed is not None else frontend.compile(asked)
    if program is not None:
        frontend.check_size(program, asked, told)
    if ticketed is not None:
        return rest | {PROGRAM: to_text(ticketed), TICKET: asked}
    return rest if program is None else rest | {PROGRAM: to_text(program)}
