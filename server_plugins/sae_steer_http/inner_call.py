"""A request that one route makes of another of the same application, on behalf of its own client.

It goes through every middleware, as if the client had sent it: it is queued, limited, counted and cancelled likewise.
"""

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Scope

_KEPT = ("type", "asgi", "http_version", "method", "scheme", "server", "client", "root_path", "extensions")
_HEADERS = (b"host", b"origin", b"authorization")


async def post_json(request: Request, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Posts ``body`` to ``path`` of the application that ``request`` came to.

    Args:
        request: Whose keys and host it has, and whose hanging up ends it; its body must have been read.
        path: A route that answers with JSON.
        body: What is sent.

    Returns:
        The status and the parsed answer.

    Raises:
        ClientDisconnect: The client hung up before the answer was there.
    """
    content = json.dumps(body).encode()
    unsent = [content]
    status = 500
    answer = bytearray()

    async def receive() -> Message:
        if unsent:
            return {"type": "http.request", "body": unsent.pop(), "more_body": False}
        return await request.receive()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answer.extend(message.get("body", b""))

    await request.app(_scope(request.scope, path, len(content)), receive, send)
    if not answer:
        raise ClientDisconnect
    return status, json.loads(bytes(answer))


def _scope(outer: Scope, path: str, length: int) -> Scope:
    full = outer.get("root_path", "") + path
    headers = [(name, value) for name, value in outer["headers"] if name in _HEADERS]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    return {name: outer[name] for name in _KEPT if name in outer} | {
        "path": full,
        "raw_path": full.encode(),
        "query_string": b"",
        "headers": headers,
        "state": dict(outer.get("state", {})),
    }
