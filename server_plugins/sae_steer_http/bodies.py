"""From the bytes of a request to a validated value: bounded, strict, with the JSON path of the first fault."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from sae_steer.errors import BodyTooLarge, RequestError
from sae_steer.schema import json_path, schema_error
from sae_steer.strict_json import loads

_Body = TypeVar("_Body", bound=BaseModel)
_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field", "unsupported": "unsupported"}


async def read_json(request: Request, limit: int) -> Any:
    """Reads and parses the body, never holding more than ``limit`` bytes of it.

    Raises:
        BodyTooLarge: It is longer than ``limit``, whether or not it said so.
        RequestError: It is not declared as JSON, or is not JSON in the strict sense.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise RequestError("Send the body as JSON, with the header Content-Type: application/json.", code="not_json")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for piece in request.stream():
        if len(body) + len(piece) > limit:
            raise _too_large(limit)
        body += piece
    return loads(bytes(body))


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than this server's limit of {limit} bytes (max_body_bytes).")


def parse_body(model: type[_Body], value: object) -> _Body:
    """Validates a parsed body; raises :class:`RequestError` with the JSON path of the first fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["loc"][:1] == ("steering",):
            raise schema_error(error, "") from None
        raise _request_error(first, error.error_count()) from None


def _request_error(fault: ErrorDetails, count: int) -> RequestError:
    path = json_path("", fault)
    more = f" ({count - 1} more faults)" if count > 1 else ""
    message = fault["msg"].removeprefix("Value error, ")
    text = f"{path}: {message}{more}" if path else message + more
    return RequestError(text, param=path or None, code=_CODES.get(fault["type"]))
