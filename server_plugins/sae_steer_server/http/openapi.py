"""The OpenAPI document, true to the word: bodies are parsed by hand, so their schemas are put in by hand."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import sae_steer
from sae_steer.schema import Profile
from sae_steer_server.http.openai_models import ChatRequest, CompletionRequest
from sae_steer_server.http.replies import ErrorReply
from sae_steer_server.http.security import ADMIN_HEADER

Responses = dict[int | str, dict[str, Any]]

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, Profile)
_DESCRIPTIONS = {
    400: "The request cannot be honoured as asked; `error.param` is the JSON path at fault.",
    401: "A key is missing or wrong.",
    403: "A foreign Host or Origin, or something that is switched off.",
    404: "There is no such thing.",
    413: "The body is too large.",
    422: "The dose limit was passed, and `on_dose` is `fail`.",
    429: "The server is full; try again after `Retry-After` seconds.",
    500: "The request failed. It was not answered otherwise than asked.",
    503: "The engine has stopped.",
}


def errors(*statuses: int) -> Responses:
    """The error responses of a route; 403 and 500 can come from every one."""
    return {
        status: {"model": ErrorReply, "description": _DESCRIPTIONS[status]} for status in sorted({*statuses, 403, 500})
    }


GENERATION_ERRORS = errors(400, 401, 404, 413, 422, 429, 503)


def stream_or_json(whole: type[BaseModel], event: type[BaseModel]) -> dict[str, Any]:
    """The 200 of a generation route."""
    description = f"The answer; with `stream`, server-sent events: each a {event.__name__} or an error, then `[DONE]`."
    return {
        "model": whole,
        "description": description,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that parses it by hand."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def admin_security() -> dict[str, Any]:
    """Marks a route that needs the admin key as well."""
    return {"x-admin": True}


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
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REF)[1]["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of errors is never sent
        schemas.pop(name, None)
    components["securitySchemes"] = _schemes(api_key=api_key, admin_key=admin_key)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            needed = _needed(path, operation, components["securitySchemes"])
            if needed:
                operation["security"] = [needed]
    return document


def _schemes(*, api_key: bool, admin_key: bool) -> dict[str, Any]:
    schemes: dict[str, Any] = {}
    if api_key:
        schemes["apiKey"] = {"type": "http", "scheme": "bearer"}
    if admin_key:
        schemes["adminKey"] = {"type": "apiKey", "in": "header", "name": ADMIN_HEADER}
    return schemes


def _needed(path: str, operation: dict[str, Any], schemes: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys that a route needs, of those that the server has."""
    admin = operation.pop("x-admin", False)
    wanted = [("apiKey", path.startswith("/v1/")), ("adminKey", admin)]
    return {name: [] for name, needed in wanted if needed and name in schemes}
