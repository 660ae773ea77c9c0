"""What every route works with: the loaded parts of one server, and what its names mean."""

import asyncio
import time
from dataclasses import dataclass, field

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from sae_steer.capabilities import TRANSFORMERS, Capabilities
from sae_steer.catalog import Catalog
from sae_steer.limits import Limits
from sae_steer.sites import Site
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
        catalog: The SAEs, vectors and profiles.
        sites: The places that are hooked.
        engine: Generates.
        metrics: Counts.
        vocabulary: Token ids are below this number.
        bos_token_id: The beginning-of-sequence token, for ``skip_bos``.
        capabilities: What can be honoured.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    catalog: Catalog
    sites: tuple[Site, ...]
    engine: Engine
    metrics: Metrics
    vocabulary: int
    bos_token_id: int | None
    capabilities: Capabilities = TRANSFORMERS
    created: int = field(default_factory=lambda: int(time.time()))
    concurrency: Concurrency = field(init=False)
    _stopping: "asyncio.Task[None] | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.concurrency = Concurrency(self.settings.max_concurrent, self.metrics)

    @property
    def limits(self) -> Limits:
        """What the slots hold."""
        return self.settings.limits

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
