"""One completion on its way from the engine's thread to its reader in the event loop."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from sae_steer.errors import SteerError
from sae_steer.readings import TextOf
from sae_steer.report import Run
from sae_steer.token_texts import TokenTexts
from sae_steer_server.engine.detokenize import Detokenizer, StopTexts
from sae_steer_server.engine.sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities of the unprocessed model at one completion token.

    Args:
        token: Id of the token that was chosen.
        text: Its text.
        logprob: Its log-probability.
        top: Id, text and log-probability of the most likely tokens, best first.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion.

    Args:
        text: New text. It may lag behind the tokens: half characters and beginnings of stop texts are held back.
        tokens: Number of new completion tokens; one that ends the sequence counts, and has no text.
        logprobs: One for each new token, where they were asked for.
        finish_reason: In the last chunk, why it is the last.
        steering: Of a steered request, steering's block, as far as it is new: in the last chunk what was done and what
            was read in all, in those before it what was read of single tokens; None = nothing.
        values: How many activations of single tokens there were so far.
        computed: How many numbers were kept for them and for summaries so far.
    """

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    steering: dict[str, Any] | None = None
    values: int = 0
    computed: int = 0


class Reports(Protocol):
    """What is told of a run."""

    def report(self, run: Run) -> dict[str, Any]:
        """The ``applied`` block."""
        ...

    def new_readings(self, run: Run, text_of: TextOf) -> list[dict[str, Any]] | None:
        """What was read of tokens since the last call."""
        ...

    def readings(self, run: Run, text_of: TextOf) -> dict[str, Any]:
        """The rest of that, with the sums and the triggers."""
        ...


class Request:
    """A request in the batch. Made in the event loop; its methods say which thread they belong to.

    Args:
        sampling: How its tokens are chosen.
        run: What steers it.
        detokenizer: Makes its text.
        texts: Names tokens in log-probabilities.
        eos: Token ids that end the sequence.
        on_settled: Called in the event loop once no later forward pass can hold the request.
    """

    def __init__(
        self,
        sampling: Sampling,
        run: Run | None,
        *,
        detokenizer: Detokenizer,
        texts: TokenTexts,
        eos: frozenset[int],
        on_settled: Callable[[], None],
    ) -> None:
        self.id = str(uuid.uuid4())
        self.sampling = sampling
        self.run = run
        self.over = False  # nothing more is told to the reader
        self.logprobs: Tensor | None = None  # [V], of the step that is running
        self._detokenizer = detokenizer
        self._stop = StopTexts(sampling.stop)
        self._texts = texts
        self._eos = eos
        self._on_settled = on_settled
        self._seen = 0
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[Chunk | SteerError] = asyncio.Queue()

    async def receive(self) -> Chunk:
        """The next chunk, in the event loop. Raises what ended the request."""
        item = await self._inbox.get()
        if isinstance(item, SteerError):
            raise item
        return item

    def take(self, tokens: Sequence[int], *, finished: bool, reports: Reports) -> None:
        """Tells the tokens that are new, in the engine's thread. Sets :attr:`over` at the last one.

        Args:
            tokens: All completion tokens so far.
            finished: Whether the scheduler has ended the request.
            reports: Tells what was done to it.
        """
        while self._seen < len(tokens) and not self.over:
            token = tokens[self._seen]
            self._seen += 1
            last = finished and self._seen == len(tokens)
            ended = token in self._eos
            fired = self._fired()
            text = "" if ended else self._stop.push(self._detokenizer.push(token))
            if (ended or fired or last) and not self._stop.found:
                text += self._stop.push(self._detokenizer.finish())
                text += self._stop.finish()
            stopped = ended or fired or self._stop.found
            reason: FinishReason | None = "stop" if stopped else "length" if last else None
            self.over = reason is not None
            self._post(Chunk(text, 1, self._logprob(token), reason, self._steering(reports), *self._read()))

    def _read(self) -> tuple[int, int]:
        """Activations of single tokens that were read in all, and numbers that were kept for what was read."""
        reader = self.run.reader if self.run is not None else None
        return (reader.told, reader.computed) if reader is not None else (0, 0)

    def _fired(self) -> bool:
        """Whether a trigger has ended the answer with the token that was sampled last."""
        if self.run is None or self.run.reader is None or self.run.reader.stop is None:
            return False
        return self.run.prompt_length + self._seen - 2 >= self.run.reader.stop  # the position before that token

    def _steering(self, reports: Reports) -> dict[str, Any] | None:
        """Steering's block, as far as it is new."""
        if self.run is None:
            return None
        if self.over:
            return {"applied": reports.report(self.run)} | reports.readings(self.run, self._texts.text)
        new = reports.new_readings(self.run, self._texts.text)
        return {"readings": new} if new is not None else None

    def fail(self, error: SteerError) -> None:
        """Ends the request with an error, from any thread; does nothing where it is over."""
        if not self.over:
            self.over = True
            self._post(error)

    def settle(self) -> None:
        """No later forward pass can hold the request: tells the event loop, from any thread."""
        self._in_loop(self._on_settled)

    def _logprob(self, token: int) -> tuple[TokenLogprob, ...]:
        if self.logprobs is None:
            return ()
        values, ids = self.logprobs.topk(self.sampling.logprobs or 0)
        top = tuple(
            (other, self._texts.text(other), value) for other, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        chosen = float(self.logprobs[token])
        self.logprobs = None
        return (TokenLogprob(token, self._texts.text(token), chosen, top),)

    def _post(self, item: Chunk | SteerError) -> None:
        self._in_loop(self._inbox.put_nowait, item)

    def _in_loop(self, call: Callable[..., None], *args: object) -> None:
        # A closed loop has no reader left, and the engine's thread must not die of it.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)
