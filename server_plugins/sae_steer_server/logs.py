"""Structured logs: one JSON object a line on stderr, ours and the libraries' alike; never the text of a prompt."""

import logging
import sys
import traceback
from dataclasses import dataclass, field
from secrets import token_hex
from time import perf_counter
from typing import Any, cast

import structlog
from starlette.types import Scope

_RECORD = "sae_steer.record"


@dataclass(slots=True)
class Record:
    """What is known of one HTTP request by its end; becomes its log line.

    Args:
        id: Identifies the request in the log and, as ``X-Request-Id``, to the client.
    """

    id: str = field(default_factory=lambda: f"req-{token_hex(12)}")
    started: float = field(default_factory=perf_counter)
    code: str | None = None
    program: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return perf_counter() - self.started

    def fields(self) -> dict[str, Any]:
        """What is known, for the log line."""
        known = {
            "code": self.code,
            "program": self.program,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }
        return {key: value for key, value in known.items() if value is not None}


def open_record(scope: Scope) -> Record:
    """Attaches a new record to an HTTP request."""
    record = Record()
    scope[_RECORD] = record
    return record


def record_of(scope: Scope) -> Record:
    """The record of an HTTP request."""
    return cast(Record, scope[_RECORD])


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger of this server; goes through the standard library's, so that levels and handlers are one thing."""
    return structlog.stdlib.get_logger(name)


def where(error: BaseException) -> list[str]:
    """The frames of an unexpected error, innermost last, without its message: that may quote a prompt."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]


def _exception(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Replaces an exception by its class and frames, for the reason given at :func:`where`."""
    info = event.pop("exc_info", None)
    error = info[1] if isinstance(info, tuple) else sys.exc_info()[1] if info is True else info
    if isinstance(error, BaseException):
        event.update(error=type(error).__name__, frames=where(error))
    return event


def configure(level: str) -> None:
    """Sends all logs of this process to stderr as JSON lines, warnings included."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _exception,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # transformers' batching brings a handler of its own, which writes plain text between our lines.
    batching = logging.getLogger("ContinuousBatchingLogger")
    batching.handlers.clear()
    batching.propagate = True
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
