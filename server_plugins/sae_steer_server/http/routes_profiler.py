"""``/start_profile`` and ``/stop_profile``, named as vLLM names them, for whoever has the admin key."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from sae_steer_http.openapi import admin_security, errors
from sae_steer_http.replies import Reply
from sae_steer_http.routes_steering import admin
from sae_steer_server.engine.profiler import StepProfiler
from sae_steer_server.state import state_of

router = APIRouter(tags=["profiling"])


class Trace(Reply):
    """What a trace has come to."""

    file: str | None = Field(description="Its name in the server's --profile-dir; null = none was written.")


def profiler(request: Request) -> StepProfiler:
    """The server's profiler, which it has wherever these routes are."""
    found = state_of(request).engine.profiler
    assert found is not None
    return found


Profiler = Annotated[StepProfiler, Depends(profiler)]


@router.post(
    "/start_profile",
    responses={200: {"model": Trace}, **errors(401)},
    openapi_extra=admin_security(),
    dependencies=[Depends(admin)],
)
async def start_profile(profiler: Profiler) -> Response:
    """Traces one forward pass of the batch, once some more have passed."""
    profiler.arm()
    return Response(Trace(file=None).encode(), media_type="application/json")


@router.post(
    "/stop_profile",
    responses={200: {"model": Trace}, **errors(401)},
    openapi_extra=admin_security(),
    dependencies=[Depends(admin)],
)
async def stop_profile(profiler: Profiler) -> Response:
    """Says what was written."""
    path = profiler.disarm()
    return Response(Trace(file=path.name if path is not None else None).encode(), media_type="application/json")
