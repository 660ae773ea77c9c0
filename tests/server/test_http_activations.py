"""What fires on a text, and what differs between two: against the SAE itself on the model's own residual stream."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sae_steer import embedded
from sae_steer.sae import Labels
from sae_steer_server.settings import LabelSource, Settings
from tests.server.conftest import Serve, Served
from tests.steered_models import SteeredModel, all_features, embedded_model

ROUTE = "/v1/steering/activations"
SEA, TRAIN = "We sailed over the ocean to the harbour.", "The train was late at the station."


@pytest.fixture(scope="module")
def steered() -> SteeredModel:
    return embedded_model()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    running = Served(Settings(model="demo", device="cpu", dtype="float32", port=0, max_concurrent=4))
    yield running
    running.stop()


def ask(client: httpx.Client, status: int = 200, **body: Any) -> dict[str, Any]:
    reply = client.post(ROUTE, json={"sae": "embedded"} | body)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_what_fires_on_a_text(client: httpx.Client, steered: SteeredModel) -> None:
    answer = ask(client, text=SEA, top_k=12)
    f = all_features(steered, SEA)
    wanted = f.amax(dim=0).topk(12)
    assert [entry["feature"] for entry in answer["data"]] == wanted.indices.tolist()
    labels = Labels.load(embedded.SAE)
    for entry in answer["data"]:
        own = f[:, entry["feature"]]
        (on,) = entry["on"]
        assert on["max"] == pytest.approx(own.max().item(), rel=1e-4)
        assert on["mean"] == pytest.approx(own.mean().item(), rel=1e-4)
        assert on["fired"] == pytest.approx((own > 0).double().mean().item())
        assert on["token"] == own.argmax().item()
        known = labels.get(entry["feature"])
        assert known is not None
        assert (entry["label"], entry["reference_max"], entry["difference"]) == (known.label, known.reference_max, None)
    tokens = answer["texts"][0]["tokens"]
    assert len(tokens) == len(f)
    assert "".join(tokens[1:]) == SEA
    # Wrong variants would be another row: the mean in the place of the maximum, and the first token left out.
    assert wanted.indices.tolist() != f.mean(dim=0).topk(12).indices.tolist()
    assert wanted.indices.tolist() != f[1:].amax(dim=0).topk(12).indices.tolist()


def test_what_differs_between_two_texts(client: httpx.Client, steered: SteeredModel) -> None:
    answer = ask(client, texts=[SEA, TRAIN], top_k=20)
    first, second = (all_features(steered, text).amax(dim=0) for text in (SEA, TRAIN))
    apart = second - first
    wanted = apart.abs().topk(20).indices.tolist()
    assert [entry["feature"] for entry in answer["data"]] == wanted
    # A wrong variant would be another order: what is not among the largest of a text taken for 0 there.
    listed = [torch.where(f >= f.topk(64).values[-1], f, 0.0) for f in (first, second)]
    assert wanted != (listed[1] - listed[0]).abs().topk(20).indices.tolist()
    for entry in answer["data"]:
        assert entry["difference"] == pytest.approx(apart[entry["feature"]].item(), rel=1e-3, abs=1e-4)
        on = [each["max"] for each in entry["on"]]
        assert on == pytest.approx([first[entry["feature"]].item(), second[entry["feature"]].item()], rel=1e-4)
    # What was not compared cannot be apart by more than this; every feature above it was.
    assert 0 < answer["floor"] < abs(answer["data"][-1]["difference"])
    names = {entry["label"] for entry in answer["data"][:6]}
    assert any("sea" in (name or "") for name in names)
    assert any("train" in (name or "") for name in names)


def test_equal_texts_do_not_differ(client: httpx.Client) -> None:
    assert ask(client, texts=[SEA, SEA])["data"] == []


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"text": SEA, "sae": "none"}, 404, "sae", "unknown_sae"),
        ({}, 400, None, "invalid_request"),
        ({"text": SEA, "texts": [SEA, SEA]}, 400, None, "invalid_request"),
        ({"text": ""}, 400, "text", None),
        ({"texts": [SEA]}, 400, "texts", None),
        ({"text": SEA, "top_k": 65}, 400, "top_k", None),
        ({"text": SEA, "top_k": 0}, 400, "top_k", None),
        ({"text": SEA, "steering": {}}, 400, "steering", "unknown_field"),
        ({"text": "word " * 3000}, 400, "text", "context_length_exceeded"),
        ({"texts": [SEA, "word " * 3000]}, 400, "texts", "context_length_exceeded"),
        ({"text": "x" * (2**20 + 1)}, 413, None, "body_too_large"),
    ],
)
def test_refused(client: httpx.Client, body: dict[str, Any], status: int, param: str | None, code: str | None) -> None:
    error = ask(client, status, **body)["error"]
    assert error["param"] == param
    assert code is None or error["code"] == code


def test_a_dictionary_that_is_not_held_whole_is_refused_by_name(serve: Serve) -> None:
    with serve() as running, running.http() as client:
        error = ask(client, 400, sae="last", text="ab")["error"]
        assert error["code"] == "unsupported"
        assert "--whole" in error["message"]
        assert error["param"] == "top_k"


def test_it_is_limited_and_counted_as_a_request(client: httpx.Client, served: Served) -> None:
    def requests() -> float:
        name = 'sae_steer_requests_total{route="/v1/completions",status="200"}'
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    before = requests()
    ask(client, text=SEA)
    assert requests() == before + 2
    with served.state.concurrency.hold(3):
        ask(client, text=SEA)
        reply = client.post(ROUTE, json={"sae": "embedded", "texts": [SEA, TRAIN]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_many_requests")
    assert reply.headers["retry-after"] == "1"


def test_a_client_who_leaves_ends_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    generate = served.state.engine.generate

    async def endless(*args: Any, **kwargs: Any) -> Any:
        try:
            await asyncio.sleep(60)
            async for chunk in generate(*args, **kwargs):
                yield chunk
        finally:
            ended.set()

    monkeypatch.setattr(served.state.engine, "generate", endless)
    with served.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post(ROUTE, json={"sae": "embedded", "text": SEA}, timeout=0.3)
    assert ended.wait(10)
    deadline = time.monotonic() + 10
    while served.state.concurrency.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.state.concurrency.running == 0


def test_given_labels_are_told_to_who_has_the_key(tmp_path: Path) -> None:
    markup = "<img src=x onerror=alert(1)>"
    (tmp_path / "labels.csv").write_text(f"feature,label\n551,{markup}\n")
    labels = (LabelSource("embedded", tmp_path / "labels.csv"),)
    running = Served(Settings(model="demo", device="cpu", port=0, labels=labels, api_key="open sesame"))
    try:
        with running.http() as stranger, running.http(headers={"Authorization": "Bearer open sesame"}) as client:
            found = client.get("/v1/steering/features", params={"q": "onerror"}).json()["data"]
            assert [(entry["feature"], entry["label"], entry["reference_max"]) for entry in found] == [
                (551, markup, 35.1794)
            ]
            fires = ask(client, text=SEA)["data"]
            assert [entry["label"] for entry in fires if entry["feature"] == 551] == [markup]
            ask(stranger, 401, text=SEA)
    finally:
        running.stop()
