"""The engine: completions from one model, each with its own program and its own sampling, in one running batch."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_steer.errors import EngineDown, LimitExceeded, RequestError
from sae_steer.program import Program
from sae_steer.runtime import Runtime
from sae_steer.token_texts import TokenTexts
from sae_steer_server.engine.admission import Admission, SlotMetrics
from sae_steer_server.engine.batching import Batch
from sae_steer_server.engine.detokenize import Detokenizer
from sae_steer_server.engine.profiler import StepProfiler
from sae_steer_server.engine.request import Chunk, Request, TokenLogprob
from sae_steer_server.engine.sampling import Sampling
from sae_steer_server.engine.steps import StepMetrics, Steps

__all__ = ["Chunk", "Engine", "EngineMetrics", "Sampling", "TokenLogprob"]

_DIED = "The engine has died; nothing can be answered."
_STOPPING = "The server is shutting down."


class EngineMetrics(StepMetrics, SlotMetrics, Protocol):
    """What the engine tells the metrics."""


class Engine:
    """Serves one model. All but :meth:`start` belongs to one event loop.

    Args:
        model: The model, with the runtime attached to it.
        tokenizer: Makes text of tokens.
        runtime: Steers the model.
        max_running: Most requests in one forward pass.
        max_model_len: Longest prompt with its completion, in tokens.
        kv_tokens: Tokens that the key-value cache holds; see :class:`Batch`.
        metrics: Told of steps, slots and waiting requests.
        profiler: Traces a forward pass when it is asked to; None = never.

    Raises:
        StartError: The key-value cache does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        runtime: Runtime,
        *,
        max_running: int,
        max_model_len: int,
        kv_tokens: int | None = None,
        metrics: EngineMetrics | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._runtime = runtime
        self._texts = TokenTexts(tokenizer)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._eos = _eos_tokens(model, tokenizer)
        self._admission = Admission(runtime, metrics)
        self.profiler = profiler
        self._steps = Steps(runtime, metrics, lambda id_: self._batch.cancel(id_), profiler)
        self._batch = Batch(
            model,
            self._steps,
            eos=self._eos,
            max_running=max_running,
            max_model_len=max_model_len,
            kv_tokens=kv_tokens,
        )
        self._down: str | None = "The engine was not started."
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams = 0
        self._idle = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Whether requests can be answered: False before the start, and once the engine's thread has ended."""
        return self._batch.alive

    def start(self) -> None:
        """Starts the engine's thread."""
        self._down = None
        thread = self._batch.start()
        threading.Thread(target=self._watch, args=(thread,), name="sae-steer-watch", daemon=True).start()

    async def stop(self, grace: float) -> None:
        """Refuses new requests, gives those that run ``grace`` seconds to finish, and fails the rest.

        Raises nothing; a second call does nothing.
        """
        self._down = self._down or _STOPPING
        self._admission.refuse_waiting(_STOPPING)
        if self._streams and self.alive:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace)
        for request in list(self._steps.requests.values()):
            request.fail(EngineDown(_STOPPING))
        await asyncio.to_thread(self._batch.stop)

    def generate(
        self, prompt: Sequence[int], program: Program | None, sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        """Completes a prompt. Closing the iterator, or cancelling who reads it, ends the request.

        Args:
            prompt: Token ids.
            program: What steers it; None = nothing.
            sampling: How its tokens are chosen.

        Returns:
            The completion's pieces; the last one has a finish reason.

        Raises:
            RequestError: At once, for what cannot be run.
            EngineDown: At once or while reading: the engine has stopped.
            RunFailed: While reading: steering ended the request.
        """
        sampling.check()
        if not prompt or min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise RequestError(
                f"A prompt has at least one token, and token ids below {self._vocabulary}.", param="prompt"
            )
        if len(prompt) + sampling.max_tokens > self.max_model_len:
            raise LimitExceeded(
                f"{len(prompt)} prompt tokens and {sampling.max_tokens} completion tokens are more than the "
                f"{self.max_model_len} that this server holds. Shorten the prompt or lower 'max_tokens'.",
                param="max_tokens",
            )
        self._require_up()
        return self._stream(prompt, program, sampling)

    async def _stream(
        self, prompt: Sequence[int], program: Program | None, sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        self._require_up()
        self._loop = asyncio.get_running_loop()
        self._streams += 1
        self._idle.clear()
        request = None
        try:
            request = await self._admit(prompt, program, sampling)
            reason = None
            while reason is None:
                chunk = await request.receive()
                reason = chunk.finish_reason
                yield chunk
        finally:
            self._streams -= 1
            if not self._streams:
                self._idle.set()
            if request is not None and request.id in self._steps.requests:
                request.over = True
                self._batch.cancel(request.id)

    async def _admit(self, prompt: Sequence[int], program: Program | None, sampling: Sampling) -> Request:
        """Waits for a slot where the request is steered, and hands the request to the scheduler."""
        detokenizer = Detokenizer(self._tokenizer, prompt)
        run = None
        if program is not None:
            slot = await self._admission.acquire(program)
            run = self._runtime.start_run(program, slot, len(prompt))
        eos = frozenset[int]() if sampling.ignore_eos else self._eos
        request = Request(
            sampling,
            run,
            detokenizer=detokenizer,
            texts=self._texts,
            eos=eos,
            on_settled=partial(self._settled, program),
        )
        self._steps.requests[request.id] = request
        try:
            self._batch.add(request.id, prompt, sampling.max_tokens, eos=eos)
        except EngineDown:
            self._steps.dropped(request.id)
            raise
        return request

    def _settled(self, program: Program | None) -> None:
        if program is not None:
            self._admission.release(program)

    def _require_up(self) -> None:
        if self._down is not None or not self.alive:
            raise EngineDown(self._down or _DIED)

    def _watch(self, thread: threading.Thread) -> None:
        """Waits for the engine's thread to end, in a thread of its own, and tells whoever waits for an answer."""
        thread.join()
        self._down = self._down or _DIED
        if self._loop is not None:
            with suppress(RuntimeError):  # a closed loop has nobody who waits
                self._loop.call_soon_threadsafe(self._fail_all, self._down)

    def _fail_all(self, reason: str) -> None:
        self._admission.refuse_waiting(reason)
        for id_, request in list(self._steps.requests.items()):
            request.fail(EngineDown(reason))
            self._steps.dropped(id_)


def _eos_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end a sequence: the generation config's, else the model's, else the tokenizer's."""
    text_config = model.config.get_text_config()
    for source in (model.generation_config, text_config, tokenizer):
        found: int | list[int] | None = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
