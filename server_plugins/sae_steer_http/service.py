"""What the routes of ``/v1/steering`` work with, whichever host serves them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Request

from sae_steer.capabilities import Capabilities
from sae_steer.catalog import Catalog
from sae_steer.limits import Limits
from sae_steer.sites import Site


@dataclass(frozen=True, slots=True)
class SteeringService:
    """The steering of one served model, as HTTP sees it. A host puts it into ``app.state.steering``.

    Args:
        catalog: The SAEs, vectors and profiles.
        sites: The places that are hooked.
        capabilities: What can be honoured.
        limits: What the slots hold.
        bos_token_id: The beginning-of-sequence token, for ``skip_bos``; None = the model has none.
        model_names: Names under which the model is served.
        admin_key: Key of what changes the server's state; None = nothing can.
        max_body_bytes: Largest request body.
        host_limits: Limits of the host's own, by name, that ``/v1/steering/capabilities`` shows beside the others.
    """

    catalog: Catalog
    sites: tuple[Site, ...]
    capabilities: Capabilities
    limits: Limits
    bos_token_id: int | None
    model_names: tuple[str, ...]
    admin_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 2**20
    host_limits: Mapping[str, int] = field(default_factory=dict)


def service_of(request: Request) -> SteeringService:
    """The steering of the server that a request came to."""
    service = request.app.state.steering
    assert isinstance(service, SteeringService)
    return service
