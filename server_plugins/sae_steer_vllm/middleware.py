"""The field ``steering`` on vLLM's own API server: read before its routes, answered behind them.

vLLM's routes never see the field: what is asked reaches the engine as one ticket in ``vllm_xargs``, and what happened
is put into the answer. Every other route refuses the field, a profile's name and the plugin's own keys.
"""

import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_steer.errors import BodyTooLarge, EngineDown, RequestError, SteerError, Unsupported
from sae_steer.program import Program
from sae_steer.schema import parse_steering
from sae_steer.strict_json import loads
from sae_steer_http.errors import steer_error_response
from sae_steer_http.replies import program_headers
from sae_steer_http.service import SteeringService
from sae_steer_http.steering import compile_aside, profile_of
from sae_steer_vllm.answers import Answer, BlockLost, Events
from sae_steer_vllm.channel import ASK, RESERVED
from sae_steer_vllm.frontend import Frontend

FIELD = "steering"
ROUTES = ("/v1/chat/completions", "/v1/completions")
_MODELS = "/v1/models"


class SteeringMiddleware:
    """ASGI middleware around vLLM's routes.

    Args:
        app: vLLM's routes.
        refuses: Why steered requests are refused; None = they are honoured.
    """

    def __init__(self, app: ASGIApp, *, refuses: str | None = None) -> None:
        self.app = app
        self._refuses = refuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        service: SteeringService | None = getattr(state, "steering", None)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "GET" and path == _MODELS and service is not None:
            await self.app(scope, receive, _Rewrite(send, lambda answer: _add_models(answer, service)))
            return
        if scope["method"] not in ("POST", "PUT", "PATCH") or path.startswith("/v1/steering"):
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return  # the client is gone
        again = _Again(body, receive)
        try:
            asked = _asked(body, service)
            if asked is None:
                await self.app(scope, again, send)
                return
            self._require(path, asked)
            if service is None:
                raise EngineDown("The server is still starting.")
            if len(body) > service.max_body_bytes:
                raise BodyTooLarge(f"The body is larger than {service.max_body_bytes} bytes, which steering allows.")
            program = await _program(asked, service)
            if program is None:  # the field is there and asks for nothing
                asked.pop(FIELD, None)
                await self.app(scope, again.with_body(scope, asked), send)
                return
        except SteerError as error:
            await steer_error_response(error)(scope, receive, send)
            return
        await self._steer(scope, again, send, state.sae_steer_frontend, program, asked)

    def _require(self, path: str, asked: Mapping[str, Any]) -> None:
        """Refuses what is not honoured here; raises :class:`RequestError`."""
        xargs = asked.get("vllm_xargs")
        if xargs is not None and not isinstance(xargs, Mapping):
            raise RequestError("vllm_xargs: this is not an object.", param="vllm_xargs")
        for key in (ASK, *RESERVED):
            if key in (xargs or ()):
                raise RequestError(
                    f"vllm_xargs.{key}: over HTTP, send the field 'steering' of the body itself.",
                    param=f"vllm_xargs.{key}",
                    code="reserved",
                )
        if self._refuses is not None:
            raise Unsupported(self._refuses, param=FIELD)
        if path not in ROUTES:
            raise Unsupported(f"{path} cannot be steered. Use one of {', '.join(ROUTES)}.", param=FIELD)

    async def _steer(
        self, scope: Scope, again: "_Again", send: Send, frontend: Frontend, program: Program, asked: dict[str, Any]
    ) -> None:
        asked.pop(FIELD, None)
        model = asked.get("model")
        with frontend.collecting(program, limited=_says_how_long(asked)) as (ticket, collector):
            asked["vllm_xargs"] = {**(asked.get("vllm_xargs") or {}), ASK: ticket}
            answer = Answer(collector, model, asked.get("n", 1))
            service: SteeringService = scope["app"].state.steering
            if isinstance(model, str):
                asked["model"] = _base(service, model)
            await self.app(scope, again.with_body(scope, asked), _Steered(send, answer, program))


def _asked(body: bytes, service: SteeringService | None) -> dict[str, Any] | None:
    """The body, strictly read, where it asks for anything of the plugin; None where it is all vLLM's.

    Raises:
        RequestError: It asks, and is not JSON in the strict sense.
    """
    profiles = service.catalog.profile_names() if service is not None else []
    # Escapes could hide any name, and so could UTF-16 and UTF-32, which vLLM reads; they hold zeros. Without both, what
    # is not in the bytes is not in the body.
    marks = (b"steer", b"\\u", b"\0", *(name.encode() for name in profiles))
    if not any(mark in body for mark in marks):
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it, or it is a form
    if not isinstance(value, dict):
        return None
    xargs = value.get("vllm_xargs")
    mine = isinstance(xargs, dict) and any(key in xargs for key in (ASK, *RESERVED))
    model = value.get("model")
    named = service is not None and isinstance(model, str) and _is_profile(service, model)
    if FIELD not in value and not mine and not named:
        return None
    strict = loads(body)
    assert isinstance(strict, dict)  # it is the same JSON
    return strict


def _says_how_long(asked: Mapping[str, Any]) -> bool:
    """Whether a body says how many tokens it wants at most; a completion that does not gets OpenAI's 16."""
    return "messages" not in asked or any(asked.get(k) is not None for k in ("max_tokens", "max_completion_tokens"))


def _is_profile(service: SteeringService, model: str) -> bool:
    return any(model == f"{n}:{p}" for p in service.catalog.profile_names() for n in service.model_names)


def _base(service: SteeringService, model: str) -> str:
    """The name under which vLLM serves a model: that of a profile's model without the profile."""
    ways = ((f"{n}:{p}", n) for p in service.catalog.profile_names() for n in service.model_names)
    return next((name for full, name in ways if full == model), model)


async def _program(asked: Mapping[str, Any], service: SteeringService) -> Program | None:
    """Compiles what a body asks; raises :class:`RequestError`."""
    if asked.get("use_beam_search"):
        service.capabilities.require("beam_search", param="use_beam_search")
    if type(asked.get("n", 1)) is not int:  # vLLM takes "2" and 2.0, and blocks are told apart by this number
        raise RequestError("n: this is not an integer.", param="n")
    steering = parse_steering(asked.get(FIELD, {}))
    model = asked.get("model")
    # A LoRA adapter is a model of its own to vLLM, which knows whether there is one.
    known = isinstance(model, str) and (model in service.model_names or profile_of_or_none(service, model))
    name = model if known and isinstance(model, str) else service.model_names[0]
    return await compile_aside(service, steering, name)


def profile_of_or_none(service: SteeringService, model: str) -> str | None:
    """The profile that a model's name means; None where it means none."""
    return profile_of(service, model) if _is_profile(service, model) else None


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None where the client hung up."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


class _Again:
    """A body that was read, to be read again; afterwards what else comes from the client."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    def with_body(self, scope: Scope, value: Mapping[str, Any]) -> "_Again":
        """The same with another body."""
        self._body = json.dumps(value).encode()
        MutableHeaders(scope=scope)["content-length"] = str(len(self._body))
        return self

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Rewrite:
    """Holds back a JSON answer until it is whole, and changes it."""

    def __init__(self, send: Send, change: Any) -> None:
        self._send = send
        self._change = change
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None  # ASGI
        body = self._body
        if self._start["status"] == 200:
            value = json.loads(body)
            self._change(value)
            body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
            MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})


def _add_models(answer: dict[str, Any], service: SteeringService) -> None:
    """Lists each served model with each profile."""
    cards = {card["id"]: card for card in answer["data"]}
    for profile in service.catalog.profile_names():
        for name in service.model_names:
            if name in cards:
                card = cards[name] | {"id": f"{name}:{profile}", "parent": name, "owned_by": "sae-steer"}
                answer["data"].append(card)


class _Steered:
    """Completes the answer to a steered request as it is sent."""

    def __init__(self, send: Send, answer: Answer, program: Program) -> None:
        self._send = send
        self._answer = answer
        self._program = program
        self._start: Message | None = None
        self._body = b""
        self._events: Events | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._events is not None:
            data = self._events.feed(message.get("body", b""))
            if data or not message.get("more_body", False):
                await self._send({**message, "body": data})
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._whole()

    async def _begin(self, message: Message) -> None:
        MutableHeaders(scope=message).update(program_headers(self._program))
        if Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream"):
            self._events = Events(self._answer)
            await self._send(message)
        else:
            self._start = message

    async def _whole(self) -> None:
        start, body = self._start, self._body
        assert start is not None  # ASGI
        failure = self._answer.failure
        if failure is None and start["status"] == 200:
            value = json.loads(body)
            try:
                self._answer.fill(value)
            except BlockLost as error:
                failure = error
            else:
                body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        if failure is not None:
            response = steer_error_response(failure)
            start = {**start, "status": response.status_code, "headers": response.raw_headers}
            body = bytes(response.body)
        MutableHeaders(scope=start)["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})
