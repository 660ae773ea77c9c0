"""What fails is said: with a status before the first token, with an error event after it, never as a good end."""

import asyncio
import json
import threading
from typing import Any, NoReturn

import httpx
import openai
import pytest

from sae_steer_server.engine.request import Chunk
from sae_steer_server.http import routes_generation
from sae_steer_server.http.app import create_app
from sae_steer_server.http.generation import Job, Outcome
from sae_steer_server.load import load
from sae_steer_server.settings import Settings
from tests.server.conftest import CONTEXT, Serve, Served

SECRET = "a secret prompt"


def overdose(first: int, last: int) -> dict[str, Any]:
    """Passes the dose limit on the positions from ``first`` up to ``last``."""
    edit = {"sae": "last", "features": [3], "op": "clamp", "value": 1e6, "positions": {"ranges": [[first, last]]}}
    return {"interventions": [edit], "dose": {"limit": 0.5}}


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


@pytest.mark.parametrize("stream", [False, True])
def test_an_overdose_in_the_prompt_is_a_500(client: httpx.Client, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 8, "stream": stream, "steering": overdose(0, 3)}
    reply = client.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "dose_exceeded")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_overdose_in_a_stream_ends_it_with_an_error(client: httpx.Client, path: str, n: int) -> None:
    prompt = {"prompt": "ab"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "ab"}]}
    body = {"model": "tiny", "max_tokens": 60, "n": n, "stream": True, "steering": overdose(40, 41)} | prompt
    reply = client.post(path, json=body)
    assert reply.status_code == 200
    found = events(reply.text)
    assert "[DONE]" not in found
    assert json.loads(found[-1])["error"]["code"] == "dose_exceeded"
    assert len(found) > 5, "it had begun"
    assert '"finish_reason":"' not in reply.text
    assert "applied" not in reply.text
    assert client.post("/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 200


def test_openai_client_raises_on_a_failed_stream(served: Served) -> None:
    stream = served.openai().completions.create(
        model="tiny", prompt="ab", max_tokens=60, stream=True, extra_body={"steering": overdose(40, 41)}
    )
    with pytest.raises(openai.APIError, match="dose"):
        list(stream)


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(served.state.steering.catalog, "search_features", fails)
    reply = client.get("/v1/steering/features")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
    assert SECRET not in reply.text
    logged = capfd.readouterr()
    assert "ZeroDivisionError" in logged.out + logged.err
    assert SECRET not in logged.out + logged.err


def test_what_nobody_foresaw_in_a_stream_is_an_error_event(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = routes_generation.CompletionForm
    event = form.event

    def fails_later(self: Any, job: Job, index: int, chunk: Chunk, before: Outcome) -> Any:
        if before.tokens > 3:
            raise ZeroDivisionError(SECRET)
        return event(self, job, index, chunk, before)

    monkeypatch.setattr(form, "event", fails_later)
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "temperature": 0, "stream": True}
    found = events(client.post("/v1/completions", json=body).text)
    assert json.loads(found[-1])["error"]["code"] == "internal_error"
    assert SECRET not in "".join(found)


def test_without_a_living_engine_all_is_503(base_settings: Settings) -> None:
    state = load(base_settings)

    async def ask() -> list[httpx.Response]:
        # No lifespan: the engine was never started.
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": "tiny", "prompt": "a"}
            return [
                await client.get("/health"),
                await client.post("/v1/completions", json=body),
                await client.post("/v1/completions", json=body | {"stream": True}),
                await client.get("/v1/models"),
            ]

    health, whole, stream, models = asyncio.run(ask())
    assert (health.status_code, health.json()) == (503, {"status": "down"})
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_down")
    assert stream.status_code == 503
    assert models.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_at_the_end_of_the_grace_is_told_so(serve: Serve, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": CONTEXT - 2, "n": 4, "stream": stream}
    with serve(shutdown_grace=0.0) as running, running.http() as client:
        began = threading.Event()
        metrics = running.state.metrics
        metrics.first_token = lambda _: began.set()  # type: ignore[method-assign]
        replies: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: replies.append(client.post("/v1/completions", json=body)))
        asking.start()
        assert began.wait(30)
        running.begin_to_stop()
        asking.join(30)
    (reply,) = replies
    if stream:
        assert json.loads(events(reply.text)[-1])["error"]["code"] == "engine_down"
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_down")


def test_what_ends_within_the_grace_is_answered(serve: Serve) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100}
    with serve(shutdown_grace=30.0) as running, running.http() as client:
        began = threading.Event()
        running.state.metrics.first_token = lambda _: began.set()  # type: ignore[method-assign]
        replies: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: replies.append(client.post("/v1/completions", json=body)))
        asking.start()
        assert began.wait(30)
        running.begin_to_stop()
        asking.join(30)
    assert replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 100
