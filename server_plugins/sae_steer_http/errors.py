"""Errors in OpenAI's form; the class of an error decides its status."""

import json

from starlette.responses import Response

from sae_steer.errors import BodyTooLarge, Busy, NotFound, SteerError, Unauthorized

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ModelNotFound(NotFound):
    """No served model of that name."""

    code = "model_not_found"


class ProfileNotFound(NotFound):
    """No stored profile of that name."""

    code = "unknown_profile"


class SaeNotFound(NotFound):
    """No loaded SAE of that name."""

    code = "unknown_sae"


class FeatureNotFound(NotFound):
    """A feature number outside the dictionary."""

    code = "unknown_feature"


class PageNotFound(NotFound):
    """No page of that name."""


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
