"""The outermost layer of a request: its id, its log line, its numbers, and the last resort for what nobody foresaw."""

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_steer_http.errors import internal_error_json
from sae_steer_server.logs import Record, get_logger, open_record, where
from sae_steer_server.metrics import Metrics

_CLIENT_GONE = 499  # nginx's number for a client that closed the connection; it is logged, never sent


class _Answer:
    """Watches what is sent of one response."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send = send
        self._record = record
        self.status: int | None = None
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._record.id
            self.is_stream = Headers(scope=message).get("content-type", "").startswith("text/event-stream")
        await self._send(message)

    async def fail(self, scope: Scope, receive: Receive) -> None:
        """Ends a response after an unforeseen error: as a 500, or as a last event of a stream that has begun."""
        body = internal_error_json(self._record.id)
        if self.status is None:
            await Response(body, 500, media_type="application/json")(scope, receive, self)
        elif self.is_stream:
            await self._send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
        self.status = 500


class Edge:
    """ASGI middleware around everything else.

    Args:
        app: The rest.
        metrics: Counts the requests.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics
        self._log: structlog.stdlib.BoundLogger = get_logger("sae_steer_server.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one request and writes its line."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = open_record(scope)
        answer = _Answer(send, record)
        try:
            await self.app(scope, receive, answer)
        except ClientDisconnect:
            answer.status = _CLIENT_GONE
        except Exception as error:
            record.code = "internal_error"
            self._log.error("request failed", id=record.id, error=type(error).__name__, frames=where(error))
            await answer.fail(scope, receive)
        finally:
            self._finish(scope, record, answer.status or _CLIENT_GONE)

    def _finish(self, scope: Scope, record: Record, status: int) -> None:
        # A path that no route has is a client's invention: as a label it would grow the metrics without bound.
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.request(route, status, record.seconds)
        if record.code is not None:
            self._metrics.refused(record.code)
        self._log.info(
            "request",
            id=record.id,
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(record.seconds, 6),
            **record.fields(),
        )
