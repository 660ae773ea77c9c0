"""OpenAI's form of a chat: messages, deltas, and a list of token entries."""

from collections.abc import Sequence
from typing import Any

from sae_steer_server.engine.engine import Chunk, TokenLogprob
from sae_steer_server.http.forms import LEAST_LOGPROB, choice_steering, pending_usage
from sae_steer_server.http.generation import Job, Outcome, usage
from sae_steer_server.http.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    Delta,
    TopLogprob,
)

_UNKNOWN = "\ufffd"


class ChatForm:
    """``/v1/chat/completions``.

    Args:
        logprobs: Whether log-probabilities are sent.
    """

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs

    def reply(self, job: Job, outcomes: Sequence[Outcome]) -> ChatCompletion:
        """The whole answer."""
        choices = [
            ChatChoice(
                index=i,
                message=AssistantMessage(role="assistant", content=outcome.text, refusal=None),
                logprobs=self._chat_logprobs(outcome.logprobs),
                finish_reason=outcome.finish_reason,  # type: ignore[arg-type]  # every outcome is finished here
                **choice_steering(outcome.steering),
            )
            for i, outcome in enumerate(outcomes)
        ]
        return ChatCompletion(
            id=f"chatcmpl-{job.id}",
            object="chat.completion",
            choices=choices,
            usage=usage(job, outcomes),
            **job.head(),
        )

    def opening(self, job: Job, index: int) -> ChatChunk:
        """The event that says who speaks."""
        delta = Delta(role="assistant", content="")
        return self._chunk(job, ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None))

    def event(self, job: Job, index: int, chunk: Chunk, before: Outcome) -> ChatChunk:
        """One event."""
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=chunk.text) if chunk.text else Delta(),
            logprobs=self._chat_logprobs(chunk.logprobs),
            finish_reason=chunk.finish_reason,
            **choice_steering(chunk.steering),
        )
        return self._chunk(job, choice)

    def usage_event(self, job: Job, outcomes: Sequence[Outcome]) -> ChatChunk:
        """A stream's last event."""
        return ChatChunk(
            id=f"chatcmpl-{job.id}",
            object="chat.completion.chunk",
            choices=[],
            usage=usage(job, outcomes),
            **job.head(),
        )

    def _chunk(self, job: Job, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(
            id=f"chatcmpl-{job.id}",
            object="chat.completion.chunk",
            choices=[choice],
            **pending_usage(job),
            **job.head(),
        )

    def _chat_logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content = [
            ChatLogprob(
                **_entry(token.text, token.logprob),
                top_logprobs=[TopLogprob(**_entry(text, logprob)) for _, text, logprob in token.top],
            )
            for token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """A token; its bytes are null where the text stands for bytes that are no character."""
    return {
        "token": text,
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": None if _UNKNOWN in text else list(text.encode()),
    }
