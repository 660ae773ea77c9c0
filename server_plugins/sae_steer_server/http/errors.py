"""Errors in OpenAI's form; the class of an error decides its status."""

import json

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sae_steer.errors import BodyTooLarge, Busy, NotFound, RequestError, SteerError, Unauthorized
from sae_steer_server.logs import record_of

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ROUTING = {404: "not_found", 405: "method_not_allowed"}


class ModelNotFound(NotFound):
    """No served model of that name."""

    code = "model_not_found"


class ProfileNotFound(NotFound):
    """No stored profile of that name."""

    code = "unknown_profile"


class SaeNotFound(NotFound):
    """No loaded SAE of that name."""

    code = "unknown_sae"


def error_json(message: str, *, status: int, param: str | None, code: str) -> bytes:
    """An error's body. ASCII only: a client's lone surrogate must not break the answer that quotes it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def steer_error_json(error: SteerError) -> bytes:
    """The body of one of our errors."""
    return error_json(error.message, status=error.status, param=error.param, code=error.code)


def steer_error_response(error: SteerError) -> Response:
    """The response to one of our errors."""
    headers: dict[str, str] = {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, BodyTooLarge):
        headers["Connection"] = "close"  # else the rest of the body would be read to its end, however long
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(steer_error_json(error), error.status, headers, "application/json")


def internal_error_json(request_id: str) -> bytes:
    """The body of an error that nobody foresaw: it tells a client nothing but where to look."""
    message = f"The server failed on this request; its log has the reason under {request_id}."
    return error_json(message, status=500, param=None, code="internal_error")


def install(app: FastAPI) -> None:
    """Answers every error of routes, routing and parameters in OpenAI's form."""

    async def steer(request: Request, error: Exception) -> Response:
        assert isinstance(error, SteerError)
        record_of(request.scope).code = error.code
        return steer_error_response(error)

    async def routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _ROUTING.get(error.status_code, "invalid_request")
        record_of(request.scope).code = code
        message = f"{request.method} {request.url.path}: {error.detail}."
        body = error_json(message, status=error.status_code, param=None, code=code)
        return Response(body, error.status_code, error.headers, "application/json")

    async def parameters(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        code = "unknown_field" if first["type"] == "extra_forbidden" else None
        return await steer(request, RequestError(f"{name}: {first['msg']}", param=name, code=code))

    app.add_exception_handler(SteerError, steer)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(RequestValidationError, parameters)
