"""What every route works with: the loaded parts of one server."""

import asyncio
import time
from dataclasses import dataclass, field

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from sae_steer_http.service import SteeringService
from sae_steer_server.engine.engine import Engine
from sae_steer_server.http.concurrency import Concurrency
from sae_steer_server.metrics import Metrics
from sae_steer_server.settings import Settings


@dataclass(slots=True)
class ServerState:
    """The parts of one server.

    Args:
        settings: What was decided at start.
        tokenizer: The model's tokenizer.
        steering: What the field ``steering`` and the routes of ``/v1/steering`` work with.
        engine: Generates.
        metrics: Counts.
        vocabulary: Token ids are below this number.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    steering: SteeringService
    engine: Engine
    metrics: Metrics
    vocabulary: int
    created: int = field(default_factory=lambda: int(time.time()))
    concurrency: Concurrency = field(init=False)
    _stopping: "asyncio.Task[None] | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.concurrency = Concurrency(self.settings.max_concurrent, self.metrics)

    async def stop(self) -> None:
        """Finishes or fails what runs, once, however often it is asked."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self.engine.stop(self.settings.shutdown_grace))
        await asyncio.shield(self._stopping)


def state_of(request: Request) -> ServerState:
    """The state of the server that a request came to."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
