"""What happens around each forward pass, in the engine's thread.

A raised exception there would end every request of the server, so this is the one place of the server that catches
``Exception``: it ends the requests concerned, each with an error that says so, and the batch goes on.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_steer.errors import EngineDown, NonFinite, RunFailed, SteerError
from sae_steer.runtime import Runtime, StepSummary
from sae_steer.step import Span
from sae_steer_server.engine.profiler import StepProfiler
from sae_steer_server.engine.request import Request
from sae_steer_server.engine.sampling import draw

logger = logging.getLogger(__name__)

_NOT_FINITE = "The model computed a value that was not finite. The request was ended; others were not touched."


class StepMetrics(Protocol):
    """What a forward pass tells the metrics."""

    def step(self, summary: StepSummary, running: int) -> None:
        """One forward pass over ``running`` requests."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one request in a forward pass: ``length`` of them, from absolute position ``start``."""

    id: str
    start: int
    length: int


class Steps:
    """The requests in the batch, and what is done with them at each step. No method raises.

    Args:
        runtime: Steers the model.
        metrics: Told of each forward pass.
        cancel: Asks the scheduler to drop a request before the next forward pass.
        profiler: Told where each forward pass begins; None = nothing is traced.
    """

    def __init__(
        self,
        runtime: Runtime,
        metrics: StepMetrics | None,
        cancel: Callable[[str], None],
        profiler: StepProfiler | None = None,
    ) -> None:
        self.requests: dict[str, Request] = {}
        self._runtime = runtime
        self._metrics = metrics
        self._cancel = cancel
        self._profiler = profiler
        self._running: list[tuple[range, Request]] = []  # in the forward pass: its tokens, by number

    def begin(self, parts: Sequence[Part], tokens: Sequence[int]) -> None:
        """Lays out the forward pass that is about to run.

        Args:
            parts: Whose the tokens are, in their order.
            tokens: ``[T]`` token ids; what lies beyond the parts is padding.
        """
        if self._profiler is not None:
            with self._contained(()):
                self._profiler.tick()
        self._running, spans, first = [], [], 0
        for part in parts:
            request, end = self.requests.get(part.id), first + part.length
            if request is not None:
                self._running.append((range(first, end), request))
            spans.append(Span(request.run if request is not None else None, part.start, tokens[first:end]))
            first = end
        spans.append(Span(None, 0, tokens[first:]))
        begun = False
        with self._contained(self._steered()):
            self._runtime.begin_step(spans)
            begun = True
        if not begun:
            # The steered requests have ended; for the others a plain step is laid out, with no trace of that one.
            with self._contained([request for _, request in self._running]):
                self._runtime.begin_step([Span(None, 0, tokens)])

    def end(self, not_finite: Sequence[int]) -> None:
        """Gathers what the forward pass did, and ends the requests that failed in it.

        Args:
            not_finite: Numbers of tokens, in ``[T]``, whose keys or values were not finite.
        """
        summary = StepSummary()
        with self._contained(self._steered()):
            summary = self._runtime.end_step()
        for request in self._steered():
            if request.run is not None and request.run.failure is not None:
                self._end(request, request.run.failure)
        for tokens, request in self._running:
            if any(token in tokens for token in not_finite):
                self._end(request, NonFinite(_NOT_FINITE))
        if self._metrics is not None:
            with self._contained(()):
                self._metrics.step(summary, len(self._running))

    def choose(self, positions: Sequence[tuple[str, int]], logits: Tensor) -> Tensor:
        """Makes each request's next token the largest of its row; rows of greedy requests stay as they are.

        Args:
            positions: Request and absolute position of the token to choose, for each of the first rows.
            logits: ``[N, V]`` float32; rows beyond ``positions`` mean nothing.
        """
        live = [
            (row, request, position)
            for row, (id_, position) in enumerate(positions)
            if (request := self.requests.get(id_)) is not None and not request.over
        ]
        with self._contained([request for _, request, _ in live]):
            finite = logits.amax(dim=-1).isfinite().tolist()  # NaN and +inf are maxima, wherever they stand
            for row, request, _ in live:
                if not finite[row]:
                    self._end(request, NonFinite(_NOT_FINITE))
                elif request.sampling.logprobs is not None:
                    request.logprobs = logits[row].log_softmax(dim=-1)
            sampled = [item for item in live if finite[item[0]] and item[1].sampling.temperature > 0]
            if sampled:
                rows = torch.tensor([row for row, _, _ in sampled], device=logits.device)
                chosen = draw(logits[rows], [r.sampling for _, r, _ in sampled], [p for _, _, p in sampled])
                logits[rows] = -torch.inf
                logits[rows, chosen] = 0.0
        return logits

    def deliver(self, id_: str, tokens: Sequence[int], *, finished: bool, error: str | None) -> None:
        """Tells a request's reader what is new.

        Args:
            id_: The request.
            tokens: All its completion tokens.
            finished: Whether the scheduler has ended the request.
            error: Why the scheduler failed it, which it does only when it stops.
        """
        request = self.requests.get(id_)
        if request is None:
            return
        if error is not None:
            request.fail(EngineDown(f"The engine stopped while the request ran: {error}"))
        with self._contained([request]):
            if not request.over:
                request.take(tokens, finished=finished, reports=self._runtime)
        if finished:
            self.dropped(id_)
        elif request.over:
            # It met a stop text, or was cancelled before the scheduler knew it, which the scheduler forgets.
            self._cancel(id_)

    def dropped(self, id_: str) -> None:
        """The scheduler has let go of the request: no later forward pass holds it, and its slot is free."""
        request = self.requests.pop(id_, None)
        if request is not None:
            request.settle()

    def _steered(self) -> list[Request]:
        return [request for _, request in self._running if request.run is not None]

    def _end(self, request: Request, error: SteerError) -> None:
        request.fail(error)
        self._cancel(request.id)

    @contextmanager
    def _contained(self, requests: Iterable[Request]) -> Iterator[None]:
        """Turns an exception into the end of the requests concerned."""
        try:
            yield
        except Exception as error:  # the edge of the engine's thread: see the module's first lines
            logger.exception("a step failed; the requests concerned are ended, the others go on")
            what = f"An internal error ended the request ({type(error).__name__}); the server's log has the details."
            for request in list(requests):
                self._end(request, RunFailed(what))
