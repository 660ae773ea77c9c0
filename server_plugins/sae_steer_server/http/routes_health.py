"""``/health`` and ``/metrics``, for whoever watches the server: no key, and nothing of any request."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from sae_steer_http.openapi import errors
from sae_steer_server.http.replies import Health
from sae_steer_server.state import state_of

router = APIRouter(tags=["watching"])


@router.get("/health", responses={200: {"model": Health}, 503: {"model": Health}, **errors()})
async def health(request: Request) -> Response:
    """200 while the engine lives, 503 when it has died."""
    alive = state_of(request).engine.alive
    reply = Health(status="ok" if alive else "down")
    return Response(reply.encode(), 200 if alive else 503, media_type="application/json")


@router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors()})
async def metrics(request: Request) -> Response:
    """Prometheus' text form."""
    return Response(state_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
