"""Answers what goes wrong in OpenAI's form, and leaves its code for the log."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from sae_steer.errors import RequestError, SteerError
from sae_steer_http.errors import error_json, steer_error_response
from sae_steer_server.logs import record_of

_ROUTING = {404: "not_found", 405: "method_not_allowed"}


def note(scope: Scope, error: SteerError) -> None:
    """Leaves an error's code for the log."""
    record_of(scope).code = error.code


def install(app: FastAPI) -> None:
    """Answers every error of routes, routing and parameters in OpenAI's form."""

    async def steer(request: Request, error: Exception) -> Response:
        assert isinstance(error, SteerError)
        note(request.scope, error)
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
