"""Load from the ``openai`` client: for every server, and without a start of its own."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import httpx
from openai import (
    DEFAULT_CONNECTION_LIMITS,
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
)
from openai.types import Completion

from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.load import Address, Work
from sae_steer_bench.records import LoadPlan
from sae_steer_bench.samples import Batch, Sample

_KEPT = 2.0
"""Seconds that an idle connection is kept: servers close theirs after five, and a request on it then would be lost."""


class OpenAILoad:
    """Streams completions, as many at once as the load says.

    Args:
        api_key: Bearer key; None = the server wants none.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, api_key: str | None, timeout: float) -> None:
        self._key = api_key or "none"
        self._timeout = timeout
        self._runner = asyncio.Runner()
        self._clients: dict[str, AsyncOpenAI] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for client in self._clients.values():
            self._runner.run(client.close())
        self._runner.close()

    def obstacle(self, address: Address, bodies: Sequence[dict[str, Any] | None]) -> str | None:
        """None: each request has a body of its own."""
        return None

    def run(self, address: Address, work: Work, load: LoadPlan) -> Batch:
        """Sends the requests; raises :class:`LoadFailed`."""
        try:
            return self._runner.run(self._measure(address, work, load))
        except APIStatusError as error:
            raise LoadFailed(f"{address.url} answered under load with {_words(error)}") from error
        except (APIConnectionError, httpx.HTTPError) as error:  # the second where a stream is cut
            cause = error.__cause__ or error
            reason = str(cause) or type(cause).__name__
            raise LoadFailed(f"{address.url} stopped answering under load: {reason}. Did the server end?") from error
        except APIError as error:
            raise LoadFailed(f"{address.url} ended a stream with an error: {error.message}") from error

    async def _measure(self, address: Address, work: Work, load: LoadPlan) -> Batch:
        client = self._client(address.url)
        slots = asyncio.Semaphore(load.concurrency)
        bodies = [_body(address.model, work, number, prompt) for number, prompt in enumerate(work.prompts())]

        async def send(body: dict[str, Any]) -> Sample:
            async with slots:
                return await _stream(client, body)

        start = time.perf_counter()
        samples = await _all(send, bodies, work.starts(load.rate))
        return Batch(samples, time.perf_counter() - start)

    def _client(self, url: str) -> AsyncOpenAI:
        client = self._clients.get(url)
        if client is None:
            # As many connections as requests: the client's own limit would let them wait for one another.
            # In openai's own class: which httpx it is of has changed.
            limits = type(DEFAULT_CONNECTION_LIMITS)(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEPT
            )
            client = AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key=self._key,
                timeout=self._timeout,
                max_retries=0,
                http_client=DefaultAsyncHttpxClient(limits=limits),
            )
            self._clients[url] = client
        return client


async def _all(
    send: Callable[[dict[str, Any]], Coroutine[Any, Any, Sample]],
    bodies: Sequence[dict[str, Any]],
    starts: Sequence[float],
) -> list[Sample]:
    """Sends each ``starts`` seconds after now; the first failure ends the others."""
    begin = time.perf_counter()
    tasks: list[asyncio.Task[Sample]] = []
    try:
        for body, start in zip(bodies, starts, strict=True):
            # Against the clock: a sleep that lasts too long would make all that follow late.
            late = begin + start - time.perf_counter()
            if late > 0:
                await asyncio.sleep(late)
            tasks.append(asyncio.create_task(send(body)))
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _body(model: str, work: Work, number: int, prompt: list[int]) -> dict[str, Any]:
    extra: dict[str, Any] = {"ignore_eos": True}
    steering = work.bodies[number % len(work.bodies)]
    if steering is not None:
        extra["steering"] = steering
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": work.output_tokens,
        "temperature": 0,
        "extra_body": extra,
    }


async def _stream(client: AsyncOpenAI, body: dict[str, Any]) -> Sample:
    sent = time.perf_counter()
    times: list[float] = []
    tokens = 0
    last: Completion | None = None
    stream = await client.completions.create(stream=True, stream_options={"include_usage": True}, **body)
    async for event in stream:
        if event.choices:
            times.append(time.perf_counter())
            last = event
        if event.usage is not None:
            tokens = event.usage.completion_tokens
    if not times or not tokens:
        raise LoadFailed("A stream ended without a token, or without its usage.")
    steering = body["extra_body"].get("steering")
    if steering is not None and last is not None:
        _require_steered(steering, last)
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Sample(times[0] - sent, gaps, tokens)


def _require_steered(steering: dict[str, Any], last: Completion) -> None:
    """Raises :class:`LoadFailed` where the end of a stream does not say that what was asked was done."""
    block: dict[str, Any] = (last.choices[0].model_extra or {}).get("steering") or {}
    if steering.get("interventions") and not block.get("applied", {}).get("fired"):
        raise LoadFailed(
            "An answer under load does not say that any edit changed anything: it would be timed as steered."
        )
    if "readings" in steering and not block.get("readings"):
        raise LoadFailed("An answer under load came without the readings that were asked for.")


def _words(error: APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return f"HTTP {error.status_code}: {message or error.message}"
