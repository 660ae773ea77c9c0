"""Runs the choices of one request side by side, and gathers what they give."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any, Literal

from sae_steer.errors import RunFailed
from sae_steer.program import Program
from sae_steer.readings import extend
from sae_steer_http.readings import ReadingBudget
from sae_steer_http.replies import ProgramSummary, edits_digest, program_headers
from sae_steer_server.engine.engine import Chunk, TokenLogprob
from sae_steer_server.engine.sampling import Sampling
from sae_steer_server.http.replies import Usage
from sae_steer_server.logs import Record
from sae_steer_server.state import ServerState

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: choice j of seed s is not choice 0 of a nearby seed


@dataclass(frozen=True, slots=True)
class Job:
    """One validated request.

    Args:
        model: The model's name as the client wrote it.
        program: What steers it; None = nothing.
        prompts: Token ids; each is answered ``n`` times.
        n: Choices for each prompt.
        sampling: How each choice is sampled; its seed is that of every prompt's first choice.
        include_usage: Whether a stream ends with the usage.
    """

    model: str
    program: Program | None
    prompts: Sequence[list[int]]
    n: int
    sampling: Sampling
    include_usage: bool = False
    id: str = field(default_factory=lambda: token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def choices(self) -> int:
        """How many choices are generated."""
        return len(self.prompts) * self.n

    def head(self) -> dict[str, Any]:
        """The fields that every answer and every event of the request has."""
        head: dict[str, Any] = {"created": self.created, "model": self.model, "system_fingerprint": None}
        if self.program is not None:
            head["steering"] = ProgramSummary(program=edits_digest(self.program))
        return head

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return program_headers(self.program)


@dataclass(slots=True)
class Outcome:
    """One choice, as far as it has come.

    Args:
        characters: Length of the texts of its tokens.
    """

    text: str = ""
    tokens: int = 0
    characters: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    steering: dict[str, Any] | None = None

    def add(self, chunk: Chunk) -> None:
        """Adds what came."""
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.characters += sum(len(token.text) for token in chunk.logprobs)
        self.logprobs.extend(chunk.logprobs)
        self.finish_reason = chunk.finish_reason
        if chunk.steering is not None:
            have = self.steering or {}
            self.steering = have | chunk.steering
            if "readings" in chunk.steering:
                self.steering["readings"] = have.get("readings", [])
                extend(self.steering["readings"], chunk.steering["readings"])


def usage(job: Job, outcomes: Sequence[Outcome]) -> Usage:
    """A request's tokens; a prompt counts once, however many choices it has."""
    prompt = sum(len(ids) for ids in job.prompts)
    completion = sum(outcome.tokens for outcome in outcomes)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def generate(state: ServerState, job: Job, record: Record) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all choices as they come, each with its choice's number; closing it cancels them all.

    Raises:
        Busy: The server generates as much as it may.
        RunFailed: A choice was ended; so are the others.
        EngineDown: The engine has stopped.
    """
    with state.concurrency.hold(job.choices):
        sources = [
            state.engine.generate(job.prompts[i // job.n], job.program, _sampling(job, i % job.n))
            for i in range(job.choices)
        ]
        finished: set[int] = set()
        completion = 0
        budget, told = ReadingBudget(state.steering.limits), [(0, 0)] * job.choices
        async with aclosing(_merge(sources)) as chunks:
            async for index, chunk in chunks:
                if chunk.tokens and not completion:
                    state.metrics.first_token(record.seconds)
                completion += chunk.tokens
                values, computed = chunk.values - told[index][0], chunk.computed - told[index][1]
                if computed:
                    budget.take(values, computed)
                    state.metrics.blocks.values(values)
                    told[index] = chunk.values, chunk.computed
                if chunk.finish_reason is not None:
                    finished.add(index)
                    if chunk.steering is not None:
                        state.metrics.blocks.choice(chunk.steering)
                yield index, chunk
    if len(finished) < job.choices:
        raise RunFailed("A choice ended without saying why, so its answer cannot be trusted to be whole.")
    record.prompt_tokens, record.completion_tokens = sum(map(len, job.prompts)), completion
    state.metrics.tokens(record.prompt_tokens, completion)


def _sampling(job: Job, choice: int) -> Sampling:
    return replace(job.sampling, seed=(job.sampling.seed + choice * _GOLDEN) % 2**64)


async def _merge(sources: Sequence[AsyncIterator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Runs all sources at once; the first error ends them all.

    Not a TaskGroup: it would cancel whichever task happens to be consuming this generator (PEP 789).
    """
    queue: asyncio.Queue[tuple[int, Chunk | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(i, source, queue)) for i, source in enumerate(sources)]
    try:
        open_sources = len(tasks)
        while open_sources:
            index, chunk = await queue.get()
            if chunk is None:
                await tasks[index]  # raises what ended it
                open_sources -= 1
            else:
                yield index, chunk
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, source: AsyncIterator[Chunk], queue: "asyncio.Queue[tuple[int, Chunk | None]]") -> None:
    try:
        async for chunk in source:
            queue.put_nowait((index, chunk))
    finally:
        queue.put_nowait((index, None))
