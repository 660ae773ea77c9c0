"""The error tree: what happened to the user, and so which HTTP status it has.

    SteerError
    ├── RequestError                 400  the request cannot be honoured as asked
    │   ├── SchemaError                   the body does not have the published form
    │   ├── UnknownName                   an SAE, feature, profile, vector or concept that is not there
    │   │   └── UnknownFeature            a feature number outside the dictionary
    │   ├── DuplicateEdit                 one feature of one SAE edited twice in one program
    │   ├── LimitExceeded                 more edits, selectors, ... than this server holds
    │   └── Unsupported                   asked for what this host or this SAE cannot do exactly
    ├── Unauthorized                 401  a key is missing or wrong
    ├── Forbidden                    403  a foreign Host or Origin, or a switched-off admin route
    ├── NotFound                     404
    ├── BodyTooLarge                 413
    ├── Busy                         429  come back later (``retry_after`` seconds)
    ├── RunFailed                    500  a running request was ended, never answered unsteered
    │   ├── DoseExceeded         422      the dose limit was passed and ``on_dose`` is "fail"
    │   └── NonFinite                     the model or the edit produced a value that is not finite
    ├── EngineDown                   503  the engine has stopped; nothing can be answered
    └── StartError                   500  the server refuses to start
        ├── SiteError                     a place that does not parse or that the model does not have
        ├── WidthMismatch                 an SAE and a model of different widths
        ├── DataError                     labelled text that cannot be used as it is
        └── CheckpointError               an SAE file that cannot be read exactly
            ├── UnsafeCheckpoint              it is a pickle: never executed
            └── UnsupportedCheckpoint         it is read, but its forward is not one we compute exactly

Every error carries a stable ``code`` (for programs), a message (for people: what, why, what to do instead) and the
``param`` at fault as a JSON path into the request body, where there is one.
"""

from pathlib import Path
from typing import ClassVar


class SteerError(Exception):
    """Base of all errors of this project.

    Args:
        message: What happened, why, and what to do instead.
        param: JSON path of the field at fault, such as ``steering.interventions[0].op``.
    """

    code: ClassVar[str] = "steering_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(SteerError):
    """The request cannot be honoured exactly as asked."""

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code  # type: ignore[misc]  # one class may carry several stable codes


class SchemaError(RequestError):
    """The body does not have the published form."""

    code = "invalid_steering"


class UnknownName(RequestError):
    """A name that the catalog does not hold."""

    code = "unknown_name"


class UnknownFeature(UnknownName):
    """A feature number outside the dictionary."""

    code = "unknown_feature"


class DuplicateEdit(RequestError):
    """One feature of one SAE at one site is edited twice."""

    code = "duplicate_edit"


class LimitExceeded(RequestError):
    """More than this server holds."""

    code = "limit_exceeded"


class Unsupported(RequestError):
    """What this host, or this SAE, cannot do exactly."""

    code = "unsupported"


class Unauthorized(SteerError):
    """A key is missing or wrong."""

    code = "invalid_api_key"
    status = 401


class Forbidden(SteerError):
    """A foreign Host or Origin, or a route that is switched off."""

    code = "forbidden"
    status = 403


class NotFound(SteerError):
    """No such resource."""

    code = "not_found"
    status = 404


class BodyTooLarge(SteerError):
    """The request body is larger than the server's limit."""

    code = "body_too_large"
    status = 413


class Busy(SteerError):
    """The server holds as many requests as it may.

    Args:
        retry_after: Seconds after which trying again makes sense.
    """

    code = "too_many_requests"
    status = 429

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class RunFailed(SteerError):
    """A running request was ended rather than answered otherwise than asked."""

    code = "request_failed"
    status = 500


class DoseExceeded(RunFailed):
    """The dose limit was passed and ``on_dose`` is ``fail``, as the request asked: asking again is no use."""

    code = "dose_exceeded"
    status = 422


class NonFinite(RunFailed):
    """A value that is not finite appeared in the request's own rows."""

    code = "non_finite"


class EngineDown(SteerError):
    """The engine has stopped."""

    code = "engine_down"
    status = 503


class StartError(SteerError):
    """The server, or ``attach``, refuses to start."""

    code = "cannot_start"


class SiteError(StartError):
    """A place that does not parse, or that the model does not have."""

    code = "unknown_site"


class WidthMismatch(StartError):
    """An SAE and a model of different widths."""

    code = "width_mismatch"


class DataError(StartError):
    """Labelled text that cannot be used as it is."""

    code = "bad_data"


class CheckpointError(StartError):
    """A checkpoint that cannot be read exactly."""

    code = "bad_checkpoint"


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint that would execute code when loaded."""

    code = "unsafe_checkpoint"


class UnsupportedCheckpoint(CheckpointError):
    """A checkpoint whose forward is not one that is computed exactly here."""

    code = "unsupported_checkpoint"


class CompressedCheckpoint(UnsupportedCheckpoint):
    """An archive from which single rows cannot be read.

    Args:
        message: What to do instead.
        path: The archive.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path
