"""What routes that parse their bodies by hand say of themselves, and the part of the document that it refers to."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sae_steer_http import ADMIN_HEADER
from sae_steer_http.replies import ErrorReply

Responses = dict[int | str, dict[str, Any]]

_REF = "#/components/schemas/{model}"
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


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that parses it by hand."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def admin_security() -> dict[str, Any]:
    """Marks a route that needs the admin key as well."""
    return {"x-admin": True}


def complete(document: dict[str, Any], bodies: Sequence[type[BaseModel]], *, api_key: bool, admin_key: bool) -> None:
    """Puts into an OpenAPI document the schemas of bodies and, where the server has them, the keys of its routes."""
    components = document.setdefault("components", {})
    schemas = models_json_schema([(model, "validation") for model in bodies], ref_template=_REF)[1]["$defs"]
    components.setdefault("schemas", {}).update(schemas)
    schemes = components.setdefault("securitySchemes", {})
    schemes.update(_schemes(api_key=api_key, admin_key=admin_key))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            needed = _needed(path, operation, schemes)
            if needed:
                operation["security"] = [needed]


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
