"""The shared routes need no more of a host than its service."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from sae_steer.capabilities import TRANSFORMERS
from sae_steer.catalog import Catalog
from sae_steer.errors import SteerError
from sae_steer.limits import Limits
from sae_steer_http import routes_steering
from sae_steer_http.errors import steer_error_response
from sae_steer_http.service import SteeringService


def host() -> FastAPI:
    """An application with nothing but the shared routes."""
    app = FastAPI()
    app.state.steering = SteeringService(
        catalog=Catalog([], []),
        sites=(),
        capabilities=TRANSFORMERS,
        limits=Limits(max_edits=7),
        bos_token_id=None,
        model_names=("m",),
        host_limits={"max_model_len": 99},
    )
    app.include_router(routes_steering.router)

    async def answer(_: Request, error: Exception) -> Response:
        assert isinstance(error, SteerError)
        return steer_error_response(error)

    app.add_exception_handler(SteerError, answer)
    return app


def ask(method: str, path: str) -> httpx.Response:
    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(host()), base_url="http://localhost") as client:
            return await client.request(method, f"/v1/steering/{path}")

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "saes", 200),
        ("GET", "features", 200),
        ("GET", "features?sae=none", 404),
        ("GET", "schema", 200),
        ("GET", "profiles", 200),
        ("GET", "profiles/none", 404),
        ("PUT", "profiles/none", 403),
    ],
)
def test_a_service_is_all_that_a_host_gives(method: str, path: str, status: int) -> None:
    reply = ask(method, path)
    assert reply.status_code == status, reply.text


def test_limits_are_the_slots_and_the_hosts() -> None:
    limits = ask("GET", "capabilities").json()["limits"]
    assert (limits["max_edits"], limits["max_model_len"]) == (7, 99)
