"""The seam between generating and writing: each generation route has its own OpenAI form."""

from collections.abc import Sequence
from typing import Any, Protocol

from sae_steer_http.replies import ChoiceSteering, Reply
from sae_steer_server.engine.engine import Chunk
from sae_steer_server.http.generation import Job, Outcome

LEAST_LOGPROB = -9999.0
"""OpenAI's number for what is not to be expected; JSON has no minus infinity."""


class Form(Protocol):
    """One route's form."""

    def reply(self, job: Job, outcomes: Sequence[Outcome]) -> Reply:
        """The whole answer."""
        ...

    def opening(self, job: Job, index: int) -> Reply | None:
        """What a stream says before a choice's first text; None = nothing."""
        ...

    def event(self, job: Job, index: int, chunk: Chunk, before: Outcome) -> Reply:
        """One event; ``before`` is the choice as it was without this chunk."""
        ...

    def usage_event(self, job: Job, outcomes: Sequence[Outcome]) -> Reply:
        """A stream's last event."""
        ...


def choice_steering(block: dict[str, Any] | None) -> dict[str, ChoiceSteering]:
    """The field ``steering`` of a choice, where there is anything to tell."""
    return {"steering": ChoiceSteering.model_validate(block)} if block is not None else {}


def pending_usage(job: Job) -> dict[str, Any]:
    """OpenAI's streams that end with the usage have a null in all events before."""
    return {"usage": None} if job.include_usage else {}
