"""The plugin beside the API server or ``LLM``: from what a user asks to a program, from sums to a report."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae_steer.capabilities import Capabilities
from sae_steer.catalog import Catalog
from sae_steer.compiler import compile_program
from sae_steer.errors import RequestError, RunFailed, SchemaError, SteerError, Unsupported
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.report import applied_block
from sae_steer.runs import Sums
from sae_steer.schema import parse_steering
from sae_steer.sites import Site
from sae_steer.strict_json import loads
from sae_steer.wire import parse, to_text
from sae_steer_vllm.channel import ASK, ERROR, PROGRAM, RESERVED, SUMS, TICKET, new_ticket


class WorkerFailed(RunFailed):
    """A worker could not load a program."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # the worker's own


@dataclass(slots=True)
class Collector:
    """What became of the engine's requests that one HTTP request was made into.

    Args:
        program: What steers them, compiled once for all of its prompts.
    """

    program: Program
    done: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    failure: SteerError | None = None


@dataclass(slots=True)
class Follow:
    """A steered request, as the front end follows it.

    Args:
        program: What steers it.
        frontend: Knows the names.
        collector: Who wants to know, over HTTP.
    """

    program: Program
    frontend: "Frontend"
    collector: Collector | None
    sums: Sums | None = None
    failure: SteerError | None = None

    def take(self, payload: Mapping[str, Any]) -> None:
        """Takes over what came with an output."""
        if SUMS in payload:
            self.sums = Sums(self.program, np.frombuffer(payload[SUMS], dtype=np.float64))
            self.failure = self.sums.failure
        if ERROR in payload:
            self.failure = WorkerFailed(*payload[ERROR])

    def finish(self, request: str, index: int) -> dict[str, Any]:
        """The block of a choice that has ended, which the collector gets too."""
        if self.failure is not None:
            block: dict[str, Any] = {"error": {"code": self.failure.code, "message": self.failure.message}}
            if self.collector is not None:
                self.collector.failure = self.failure
            return block
        tallies, touched = (self.sums.tallies(), self.sums.touched) if self.sums is not None else ([], 0)
        block = {"applied": applied_block(tallies, touched, self.frontend.catalog.name_of)}
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

    @contextmanager
    def collecting(self, program: Program) -> Iterator[tuple[str, Collector]]:
        """Within the block, engine requests that ask with the ticket run ``program`` and tell the collector.

        A ticket is good in this process alone, and nobody can guess one.
        """
        ticket = new_ticket()
        self._tickets[ticket] = collector = Collector(program)
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

    def follow(self, program: str, ticket: str | None) -> Follow:
        """Follows a request that is about to enter the engine, by what :func:`admit` gave it."""
        return Follow(parse(program), self, self._tickets.get(ticket or ""))

    def ticketed(self, asked: object) -> Program | None:
        """The program of a ticket; None where it is none."""
        collector = self._tickets.get(asked) if isinstance(asked, str) else None
        return collector.program if collector is not None else None


def admit(frontend: Frontend | None, extra_args: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the engine gets for a request's ``extra_args``.

    Args:
        frontend: None where the plugin is not configured.
        extra_args: As the user sent them.

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
    if ticketed is not None:
        return rest | {PROGRAM: to_text(ticketed), TICKET: asked}
    program = frontend.compile(asked)
    return rest if program is None else rest | {PROGRAM: to_text(program)}
