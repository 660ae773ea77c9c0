"""The application: routes within security within the edge."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import sae_steer
from sae_steer_http import routes_activations, routes_playground, routes_steering
from sae_steer_http.security import Security, allowed_hosts
from sae_steer_server.http import errors, openapi, routes_generation, routes_health, routes_models, routes_profiler
from sae_steer_server.http.edge import Edge
from sae_steer_server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The application around a loaded server; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.engine.start()
        try:
            yield
        finally:
            await state.stop()

    settings = state.settings
    # No documentation pages: FastAPI's load scripts from elsewhere. No redirects: they would repeat a body to a
    # location made from the Host header.
    app = FastAPI(
        title="sae-steer",
        version=sae_steer.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
    app.state.steering = state.steering
    for routes in (
        routes_generation,
        routes_models,
        routes_steering,
        routes_activations,
        routes_playground,
        routes_health,
    ):
        app.include_router(routes.router)
    if settings.profile_dir is not None:
        app.include_router(routes_profiler.router)
    errors.install(app)
    openapi.install(app, api_key=settings.api_key is not None, admin_key=settings.admin_key is not None)
    hosts = allowed_hosts(settings.host, settings.allowed_hosts)
    app.add_middleware(Security, hosts=hosts, api_key=settings.api_key, refused=errors.note)
    app.add_middleware(Edge, metrics=state.metrics)  # added last, so it is outermost
    return app
