"""Entry point ``vllm.endpoint_plugins``: the HTTP side of the plugin, on vLLM's own API server."""

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import State
from starlette.responses import Response

from sae_steer.errors import StartError, SteerError
from sae_steer_http import routes_activations, routes_playground, routes_steering
from sae_steer_http.errors import steer_error_response
from sae_steer_http.service import SteeringService
from sae_steer_http.steering import check_profiles
from sae_steer_vllm.config import PluginConfig, config_of
from sae_steer_vllm.frontend import Frontend
from sae_steer_vllm.middleware import SteeringMiddleware

NAME = "sae_steer"
_UNNAMED = (
    "steering: this server was started without the plugin's HTTP part. Start it with the environment variable "
    f"VLLM_PLUGINS={NAME} (and the names of other plugins that it needs)."
)


class SteeringEndpoint:
    """The routes of ``/v1/steering``, and the field ``steering`` in vLLM's own."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes and the middleware."""
        for routes in (routes_steering, routes_activations, routes_playground):
            app.include_router(routes.router)
        app.add_middleware(SteeringMiddleware)

        async def steer(_: Request, error: Exception) -> Response:
            assert isinstance(error, SteerError)
            return steer_error_response(error)

        app.add_exception_handler(SteerError, steer)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Shakes hands with every worker; raises :class:`StartError` unless all have what the front end has."""
        if engine_client is None:
            raise StartError("The render server has no engine to steer. Leave the plugin out of its VLLM_PLUGINS.")
        frontend: Frontend | None = engine_client.input_processor._sae_steer
        config = config_of(engine_client.vllm_config.additional_config)
        if frontend is None or config is None:
            raise StartError(
                "The plugin is named in VLLM_PLUGINS and has no configuration. Give it one with --additional-config "
                "(`sae-steer vllm-args` prints it), or leave it out of VLLM_PLUGINS."
            )
        _shake_hands(frontend, await engine_client.collective_rpc("sae_steer_describe"))
        service = _service(frontend, config, engine_client.vllm_config, args)
        check_profiles(service)
        state.sae_steer_frontend = frontend
        state.steering = service


class Refusing:
    """Stands in where the endpoint plugin was not named: every steered request is refused, none is answered plainly."""

    name = f"{NAME}-refusal"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the refusal."""
        app.add_middleware(SteeringMiddleware, refuses=_UNNAMED)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """There is nothing to prepare."""


def _service(frontend: Frontend, config: PluginConfig, vllm_config: Any, args: Namespace) -> SteeringService:
    model = vllm_config.model_config
    return SteeringService(
        catalog=frontend.catalog,
        sites=frontend.sites,
        capabilities=frontend.capabilities,
        limits=frontend.limits,
        bos_token_id=frontend.bos_token_id,
        model_names=tuple(args.served_model_name or [args.model]),
        admin_key=os.environ.get("SAE_STEER_ADMIN_KEY") or None,
        max_body_bytes=config.max_body_bytes,
        host_limits={"max_model_len": model.max_model_len},
    )


def _shake_hands(frontend: Frontend, workers: list[dict[str, Any] | None]) -> None:
    """Raises :class:`StartError` unless the workers together steer every site, with the SAEs that are known here."""
    if not workers or any(worker is None for worker in workers):
        raise StartError("A worker runs without the plugin. Install it in the environment of every worker.")
    found = [worker for worker in workers if worker is not None]
    saes = {name: entry.sae.fingerprint for name, entry in frontend.catalog.saes.items()}
    vectors = {name: vector.fingerprint for name, vector in frontend.catalog.vectors.items()}
    for number, worker in enumerate(found):
        if worker["saes"] != saes or worker["vectors"] != vectors:
            raise StartError(f"Worker {number} has other SAEs or vectors than this server. Give all the same files.")
    missing = {str(site) for site in frontend.sites} - {site for worker in found for site in worker["sites"]}
    if missing:
        raise StartError(f"No worker steers {', '.join(sorted(missing))}.")
