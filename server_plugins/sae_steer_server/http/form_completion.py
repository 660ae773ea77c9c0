"""OpenAI's form of a completion: texts, and four parallel lists for the log-probabilities."""

from collections.abc import Sequence
from typing import Any

from sae_steer_server.engine.engine import Chunk, TokenLogprob
from sae_steer_server.http.forms import LEAST_LOGPROB, choice_steering, pending_usage
from sae_steer_server.http.generation import Job, Outcome, usage
from sae_steer_server.http.replies import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
)


class CompletionForm:
    """``/v1/completions``.

    Args:
        logprobs: Whether log-probabilities are sent.
    """

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs

    def reply(self, job: Job, outcomes: Sequence[Outcome]) -> Completion:
        """The whole answer."""
        choices = [
            CompletionChoice(
                index=i,
                text=outcome.text,
                logprobs=self._completion_logprobs(outcome.logprobs, 0),
                finish_reason=outcome.finish_reason,  # type: ignore[arg-type]  # every outcome is finished here
                **choice_steering(outcome.steering),
            )
            for i, outcome in enumerate(outcomes)
        ]
        return Completion(
            id=f"cmpl-{job.id}",
            object="text_completion",
            choices=choices,
            usage=usage(job, outcomes),
            **job.head(),
        )

    def opening(self, job: Job, index: int) -> None:
        """A completion has no speaker."""

    def event(self, job: Job, index: int, chunk: Chunk, before: Outcome) -> CompletionChunk:
        """One event."""
        choice = CompletionChunkChoice(
            index=index,
            text=chunk.text,
            logprobs=self._completion_logprobs(chunk.logprobs, before.characters),
            finish_reason=chunk.finish_reason,
            **choice_steering(chunk.steering),
        )
        return self._chunk(job, [choice], pending_usage(job))

    def usage_event(self, job: Job, outcomes: Sequence[Outcome]) -> CompletionChunk:
        """A stream's last event."""
        return self._chunk(job, [], {"usage": usage(job, outcomes)})

    def _chunk(self, job: Job, choices: list[CompletionChunkChoice], extra: dict[str, Any]) -> CompletionChunk:
        return CompletionChunk(id=f"cmpl-{job.id}", object="text_completion", choices=choices, **extra, **job.head())

    def _completion_logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        offsets: list[int] = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[max(token.logprob, LEAST_LOGPROB) for token in tokens],
            top_logprobs=[_by_text(token) for token in tokens],
            text_offset=offsets,
        )


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The likely tokens by their text, the sampled one among them; of tokens with one text the likeliest counts."""
    found: dict[str, float] = {}
    for text, logprob in [*((text, logprob) for _, text, logprob in token.top), (token.text, token.logprob)]:
        found[text] = max(found.get(text, LEAST_LOGPROB), logprob)
    return found
