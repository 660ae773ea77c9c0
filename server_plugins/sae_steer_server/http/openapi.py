"""The OpenAPI document, true to the word: bodies are parsed by hand, so their schemas are put in by hand."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

import sae_steer
from sae_steer.schema import ProfileBody
from sae_steer_http.openapi import complete, errors
from sae_steer_http.routes_activations import ActivationsRequest
from sae_steer_server.http.openai_models import ChatRequest, CompletionRequest

_BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, ProfileBody, ActivationsRequest)

GENERATION_ERRORS = errors(400, 401, 404, 413, 422, 429, 503)


def stream_or_json(whole: type[BaseModel], event: type[BaseModel]) -> dict[str, Any]:
    """The 200 of a generation route."""
    description = f"The answer; with `stream`, server-sent events: each a {event.__name__} or an error, then `[DONE]`."
    return {
        "model": whole,
        "description": description,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }


def install(app: FastAPI, *, api_key: bool, admin_key: bool) -> None:
    """Has the app describe itself; keys are in the document where the server has them."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, api_key=api_key, admin_key=admin_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to replace the document


def _document(app: FastAPI, *, api_key: bool, admin_key: bool) -> dict[str, Any]:
    document = get_openapi(
        title="sae-steer",
        version=sae_steer.__version__,
        summary="OpenAI-compatible generation with per-request sparse-autoencoder interventions.",
        routes=app.routes,
    )
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of errors is never sent
        schemas.pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    complete(document, _BODIES, api_key=api_key, admin_key=admin_key)
    return document
