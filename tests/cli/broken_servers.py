"""Servers that are wrong in one way each: a proxy before a real one, which spoils what passes through.

:class:`Proxy` passes everything on as it is. :class:`LikeVllm` has, before a server without one, a prefix cache that
keeps programs apart and says how much it shares, as vLLM's does: what is broken is broken from there.
"""

import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sae_steer_server.sockets import bind, url_of

GENERATION = ("/v1/completions", "/v1/chat/completions")
Body = dict[str, Any]
Reply = tuple[int, Body]
BLOCK = 16


class Proxy:
    """A server that passes requests on.

    Args:
        upstream: Address of the real one.
    """

    def __init__(self, upstream: str) -> None:
        self._http = httpx.AsyncClient(base_url=upstream, timeout=60)
        self.app = FastAPI(lifespan=self._lifespan)
        self.app.add_api_route("/{path:path}", self._route, methods=["GET", "POST"], include_in_schema=False)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with self._http:
            yield

    async def _route(self, request: Request) -> Response:
        path = request.url.path
        if request.method == "GET":
            status, value = await self.get(path, str(request.url.query))
            return JSONResponse(value, status)
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(self.events(path, body), media_type="text/event-stream")
        status, value = await self.post(path, body)
        return JSONResponse(value, status)

    async def get(self, path: str, query: str) -> Reply:
        """Answers a question."""
        reply = await self._http.get(path, params=query)
        return reply.status_code, reply.json()

    async def post(self, path: str, body: Body) -> Reply:
        """Answers a body."""
        reply = await self._http.post(path, json=body)
        return reply.status_code, reply.json()

    async def events(self, path: str, body: Body) -> AsyncIterator[str]:
        """Answers a body by a stream."""
        async with self._http.stream("POST", path, json=body) as reply:
            async for line in reply.aiter_lines():
                yield self.event(line) + "\n"

    def event(self, line: str) -> str:
        """A line of a stream."""
        return line


@contextmanager
def running(proxy: Proxy) -> Iterator[str]:
    """Runs a server for as long as the block lasts; yields its address."""
    server = uvicorn.Server(uvicorn.Config(proxy.app, log_level="error"))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=lambda: server.run(sockets=[sock]), name="proxy")
        thread.start()
        try:
            yield url_of(sock)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def plain(body: Body) -> Body:
    """A body without ``steering``."""
    return {key: value for key, value in body.items() if key != "steering"}


def unmarked(value: Body) -> Body:
    """An answer without steering's blocks."""
    choices = [{k: v for k, v in choice.items() if k != "steering"} for choice in value.get("choices", [])]
    return {k: v for k, v in value.items() if k != "steering"} | {"choices": choices}


def at(steering: Body, positions: Any) -> Body:
    """A program at other positions."""
    return {"interventions": [edit | {"positions": positions} for edit in steering["interventions"]]}


def mixed(before: Body | None, mine: Body | None) -> Body:
    """What a request answers that finds the keys and values of a prompt which another program computed."""
    left = before if before is not None and before["interventions"][0]["positions"] != "completion" else None
    own = mine if mine is not None and mine["interventions"][0]["positions"] != "prompt" else None
    if left is not None and own is not None:
        return {"steering": at(left, "all")}  # near enough: a program has one value for a feature
    if left is not None:
        return {"steering": at(left, "prompt")}
    return {} if own is None else {"steering": at(own, "completion")}


class NoSaes(Proxy):
    """Has no SAE."""

    async def get(self, path: str, query: str) -> Reply:
        status, value = await super().get(path, query)
        return status, {"data": []} if path == "/v1/steering/saes" else value


class Ignores(Proxy):
    """Has the routes, and ignores the field."""

    async def post(self, path: str, body: Body) -> Reply:
        return await super().post(path, plain(body))


class Stock(Ignores):
    """Knows nothing of steering."""

    async def get(self, path: str, query: str) -> Reply:
        if path.startswith("/v1/steering"):
            return 404, {"detail": "Not Found"}
        return await super().get(path, query)


class Unnamed(Stock):
    """Refuses the field, and has no routes: the half of a plugin."""

    async def post(self, path: str, body: Body) -> Reply:
        if "steering" in body:
            return 400, {"error": {"message": "steering: not here", "code": "unsupported"}}
        return await super().post(path, body)


class Checks(Proxy):
    """Validates the field, and does not steer."""

    async def post(self, path: str, body: Body) -> Reply:
        status, value = await super().post(path, body)
        return (status, value) if status != 200 else await super().post(path, plain(body))


class Pretends(Proxy):
    """Says that it steers, and answers plainly."""

    async def post(self, path: str, body: Body) -> Reply:
        status, value = await super().post(path, body)
        if status == 200 and "steering" in body:
            _, untouched = await super().post(path, plain(body))
            for choice, other in zip(value["choices"], untouched["choices"], strict=True):
                choice |= other
        return status, value


class Silent(Proxy):
    """Answers without saying how much was done."""

    def spoil(self, value: Body) -> Body:
        for choice in value.get("choices", []):
            if "steering" in choice:
                choice["steering"]["applied"]["fired"] = 0
        return value

    async def post(self, path: str, body: Body) -> Reply:
        status, value = await super().post(path, body)
        return status, self.spoil(value)


class Spreads(Proxy):
    """Steers plain requests while a steered one runs."""

    steering: Body | None = None

    async def post(self, path: str, body: Body) -> Reply:
        if "steering" in body:
            self.steering = body["steering"]
            try:
                return await super().post(path, body)
            finally:
                self.steering = None
        if self.steering is None:
            return await super().post(path, body)
        status, value = await super().post(path, body | {"steering": self.steering})
        return status, unmarked(value)


class Marks(Proxy):
    """Says of plain answers that they were steered."""

    async def post(self, path: str, body: Body) -> Reply:
        status, value = await super().post(path, body)
        if path == "/v1/completions" and "steering" not in body:
            value["steering"] = {"program": "sha256:0"}
        return status, value


class OneBlock(Proxy):
    """Says of the first choice alone what was done."""

    async def post(self, path: str, body: Body) -> Reply:
        status, value = await super().post(path, body)
        for choice in value.get("choices", [])[1:]:
            choice.pop("steering", None)
        return status, value


class BareStream(Proxy):
    """Streams without a block."""

    def event(self, line: str) -> str:
        if not line.startswith("data: {"):
            return line
        return "data: " + json.dumps(unmarked(json.loads(line[6:])))


class BrokenStream(Proxy):
    """Streams that never end as they should."""

    def event(self, line: str) -> str:
        return "" if line == "data: [DONE]" else line


class BareChat(Proxy):
    """Chats without a block."""

    async def post(self, path: str, body: Body) -> Reply:
        status, value = await super().post(path, body)
        return status, unmarked(value) if "messages" in body and status == 200 else value


class NoProfiles(Proxy):
    """Lists no profile as a model."""

    async def get(self, path: str, query: str) -> Reply:
        status, value = await super().get(path, query)
        if path == "/v1/models":
            value["data"] = value["data"][:1]
        return status, value


class Beams(Proxy):
    """Answers beam search."""

    async def post(self, path: str, body: Body) -> Reply:
        return await super().post(path, {key: value for key, value in body.items() if key != "use_beam_search"})


class Responds(Proxy):
    """Has a route that ignores the field."""

    async def post(self, path: str, body: Body) -> Reply:
        return (200, {"output": []}) if path == "/v1/responses" else await super().post(path, body)


class LikeVllm(Proxy):
    """Has a prefix cache, and keeps programs apart in it. It steers right because its upstream does."""

    reports = True

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._seen: list[tuple[str, Any]] = []

    async def get(self, path: str, query: str) -> Reply:
        status, value = await super().get(path, query)
        if path == "/v1/steering/capabilities":
            value["host"] = "vllm"
            for row in value["data"]:
                row["supported"] |= row["key"] == "prefix_cache"
        return status, value

    def key(self, steering: Body | None) -> str:
        """Which requests share blocks of their prompts: those that edit none of it are all one."""
        edits = (steering or {}).get("interventions", [])
        return json.dumps(steering) if any(edit.get("positions") != "completion" for edit in edits) else ""

    async def post(self, path: str, body: Body) -> Reply:
        own = ("cache_salt", "ignore_eos", "return_token_ids")
        rest = {key: value for key, value in body.items() if key not in own}
        if path != "/v1/completions" or rest.get("model") != "demo" or "profiles" in rest.get("steering", {}):
            return await super().post(path, rest)
        if "cache_salt" in body:
            status, value = await super().post(path, rest)
            hit = None
        else:
            hit = self.find(rest)
            status, value = await (super().post(path, rest) if hit is None else self.hit(path, rest, hit[1]))
        if status == 200:
            if "cache_salt" not in body:
                # What a request has said becomes a part of what may be found.
                self._seen.append((rest["prompt"], rest.get("steering")))
            if self.reports:
                tokens = value["usage"]["prompt_tokens"]
                cached = 0 if hit is None else (tokens - 1) // BLOCK * BLOCK
                value["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
        return status, value

    def find(self, body: Body) -> tuple[str, Any] | None:
        """The earliest request whose blocks a request takes."""
        key = self.key(body.get("steering"))
        return next(
            (seen for seen in self._seen if body["prompt"].startswith(seen[0]) and self.key(seen[1]) == key), None
        )

    async def hit(self, path: str, body: Body, steering: Body | None) -> Reply:
        """Answers a request that takes blocks of one with that program."""
        return await super().post(path, body)

    async def events(self, path: str, body: Body) -> AsyncIterator[str]:
        rest = {key: value for key, value in body.items() if key not in ("ignore_eos", "return_token_ids")}
        async for line in super().events(path, rest):
            yield line


class Leaks(LikeVllm):
    """Keeps nothing apart: who comes first decides the keys and values of the prompt."""

    reports = False

    def key(self, steering: Body | None) -> str:
        return ""

    async def hit(self, path: str, body: Body, steering: Body | None) -> Reply:
        mine = body.get("steering")
        status, value = await Proxy.post(self, path, plain(body) | mixed(steering, mine))
        if mine is None:
            return status, unmarked(value)
        # It says that it ran what was asked.
        _, claimed = await Proxy.post(self, path, body)
        value["steering"] = claimed["steering"]
        for choice, other in zip(value["choices"], claimed["choices"], strict=True):
            choice["steering"] = other["steering"]
        return status, value


class LeaksOneWay(Proxy):
    """Has a prefix cache that it says nothing of, in which plain requests find what steered ones left."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._seen: list[tuple[str, Body]] = []

    async def post(self, path: str, body: Body) -> Reply:
        prompt = body.get("prompt", "")
        if "steering" in body:
            status, value = await super().post(path, body)
            if status == 200:
                self._seen.append((prompt, body["steering"]))
            return status, value
        left = next((steering for text, steering in self._seen if prompt.startswith(text)), None)
        status, value = await super().post(path, body | mixed(left, None))
        return status, unmarked(value)


class Shares(LikeVllm):
    """Answers right, and takes tokens from the cache that it must not."""

    def key(self, steering: Body | None) -> str:
        return ""


class SharesNothing(LikeVllm):
    """Has an edit of the completion compute the whole prompt again."""

    def key(self, steering: Body | None) -> str:
        return json.dumps(steering)
