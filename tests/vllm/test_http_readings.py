"""Readings and triggers on vLLM over HTTP: streams, triggers that end an answer, the limit, a client that leaves."""

import json
import time
from typing import Any

import httpx
import pytest

from sae_steer.readings import extend
from tests.vllm.conftest import NAME, SAE, Servers, Setup, VllmServer, plugin_config

pytestmark = pytest.mark.timeout(600)

Json = dict[str, Any]
SEA, TRAINS = 551, 465
CHAT = [{"role": "user", "content": "Tell me about the sea."}]
CLAMP = {"sae": SAE, "features": [TRAINS], "op": "clamp", "value": 30.0}
READ = {"sae": SAE, "features": [SEA, TRAINS], "top_k": 3, "positions": "all"}
NEW = 12


def post(client: httpx.Client, steering: Json | None, **body: Any) -> httpx.Response:
    asked = {"model": NAME, "max_tokens": NEW, "temperature": 0} | body
    if steering is not None:
        asked["steering"] = steering
    path = "/v1/completions" if "prompt" in asked else "/v1/chat/completions"
    return client.post(path, json=asked if "prompt" in asked else {"messages": CHAT} | asked, timeout=120)


def answer(client: httpx.Client, steering: Json | None, **body: Any) -> Json:
    reply = post(client, steering, **body)
    assert reply.status_code == 200, reply.text
    found: Json = reply.json()
    return found


def events(reply: httpx.Response) -> list[Json]:
    assert reply.status_code == 200, reply.text
    *lines, end = reply.text.split("\n\n")[:-1]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_reading_changes_no_answer(client: httpx.Client) -> None:
    plain, reads = (answer(client, steering, logprobs=True) for steering in (None, {"readings": READ}))
    assert "steering" not in plain
    assert reads["steering"] == {"program": None}
    for one, other in ((plain, reads),):
        assert one["choices"][0]["message"]["content"] == other["choices"][0]["message"]["content"]
    [reading] = reads["choices"][0]["steering"]["readings"]
    count = reads["usage"]["prompt_tokens"] + NEW - 1
    assert reading["positions"] == list(range(count)), "the last token is never run through the model"
    assert {len(reading[key]) for key in ("tokens", "text", "values", "top")} == {count}
    assert "".join(reading["text"][-NEW + 1 :]) in reads["choices"][0]["message"]["content"]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Tell me about the sea."}], ids=["chat", "completion"])
def test_a_stream_tells_every_token_once_and_sums_up_at_the_end(client: httpx.Client, prompt: Json) -> None:
    steering = {"interventions": [CLAMP], "readings": [READ, READ | {"at": "after", "per_token": False}]}
    two = {"n": 2, "temperature": 1.0, "seed": 3}
    told: dict[int, list[Json]] = {0: [], 1: []}
    ends: dict[int, Json] = {}
    for event in events(post(client, steering, stream=True, **two, **prompt)):
        choice = event["choices"][0]
        block = choice.get("steering", {})
        extend(told[choice["index"]], block.get("readings", []))
        if choice["finish_reason"] is not None:
            ends[choice["index"]] = block
        else:
            assert block.keys() <= {"readings"}
    whole = answer(client, steering, **two, **prompt)
    for choice in whole["choices"]:
        index, block = choice["index"], choice["steering"]
        assert ends[index].keys() == block.keys() == {"applied", "readings", "triggers", "trigger"}
        first, second = told[index]
        assert first["positions"] == list(range(len(first["positions"])))
        for streamed, at_once in zip((first, second), block["readings"], strict=True):
            assert streamed.keys() == at_once.keys()
            assert streamed.get("tokens") == at_once.get("tokens")
            for mine, its in zip(streamed["summary"], at_once["summary"], strict=True):
                assert mine == pytest.approx(its, abs=1e-3)


def test_a_trigger_ends_the_answer_behind_the_token_sampled_there(client: httpx.Client) -> None:
    read = {"sae": SAE, "features": [SEA]}
    whole = answer(client, {"readings": read})
    reading = whole["choices"][0]["steering"]["readings"][0]
    values = [row[0] for row in reading["values"]]
    place = max(range(1, NEW - 1), key=lambda i: values[i] - max(values[:i]))
    above = (values[place] + max(values[:place])) / 2
    assert above < values[place]
    on = [{"sae": SAE, "feature": SEA, "above": above, "action": action} for action in ("flag", "stop")]
    kept = "".join(reading["text"][1 : place + 1])  # the text of the tokens after the prompt's last one
    for stream in (False, True):
        if stream:
            found = events(post(client, {"on": on}, stream=True, stream_options={"include_usage": True}))
            choice, usage = found[-2]["choices"][0], found[-1]["usage"]
            text = "".join(e["choices"][0]["delta"].get("content") or "" for e in found[:-1])
        else:
            reply = answer(client, {"on": on})
            [choice], usage = reply["choices"], reply["usage"]
            text = choice["message"]["content"]
        assert usage["completion_tokens"] == place + 1
        assert text.startswith(kept)
        assert whole["choices"][0]["message"]["content"].startswith(text)
        assert len(text) > len(kept), "the token sampled at the firing position is kept"
        assert choice["finish_reason"] == "stop"
        block = choice["steering"]
        assert [(t["fired"], t["first"]) for t in block["triggers"]] == [(1, reading["positions"][place])] * 2
        assert block["trigger"] == block["triggers"][1]


def test_an_answer_that_a_trigger_ended_leaves_nothing_behind(client: httpx.Client) -> None:
    """Its slot is free for others: more programs than there are slots, one after the other."""
    for feature in range(12):
        on = [{"sae": SAE, "feature": feature, "above": -1.0, "action": "stop"}]
        reply = answer(client, {"on": on, "interventions": [CLAMP | {"value": float(feature)}]})
        assert reply["usage"]["completion_tokens"] == 1


def test_more_than_the_limit_is_refused_or_ends_with_an_error(client: httpx.Client) -> None:
    read = {"readings": [READ | {"features": [SEA], "top_k": 128}] * 8}
    refused = post(client, read, max_tokens=100)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "limit_exceeded", "steering.readings")
    # vLLM begins a stream before it looks at the prompt.
    assert '"limit_exceeded"' in post(client, read, max_tokens=100, stream=True).text
    long = post(client, read, max_tokens=None, ignore_eos=True)
    assert (long.status_code, long.json()["error"]["code"]) == (422, "limit_exceeded")
    stream = post(client, read, max_tokens=None, ignore_eos=True, stream=True)
    assert '"limit_exceeded"' in stream.text.split("\n\n")[-3], "the last event but [DONE]"


def test_an_answer_that_goes_over_the_limit_ends_in_the_engine_too(
    vllm_server: VllmServer, client: httpx.Client
) -> None:
    """The front end alone sees how much was read: without an abort the engine would write on to the model's length."""
    steps = "vllm:iteration_tokens_total_count"
    read = {"readings": [READ | {"features": [SEA], "top_k": 128}] * 8}
    before = vllm_server.metric(steps)
    assert post(client, read, max_tokens=None, ignore_eos=True).status_code == 422
    seen = before
    while (now := vllm_server.metric(steps)) > seen:
        seen = now
        time.sleep(0.5)
    # 63 tokens fit into the limit, and the model writes up to 512; the engine goes on until the abort has come to it.
    assert 0 < seen - before < 250


@pytest.mark.parametrize(
    ("steering", "param", "code"),
    [
        ({"readings": {"sae": "none", "features": [1]}}, "steering.readings.sae", "unknown_sae"),
        ({"readings": {"sae": SAE, "features": list(range(10_000))}}, "steering.readings.features", "invalid_steering"),
        ({"readings": {"sae": SAE, "features": list(range(100))}}, "steering.readings", "limit_exceeded"),
        ({"readings": {"sae": SAE, "features": [99_999]}}, "steering.readings.features[0]", "unknown_feature"),
        ({"readings": {"sae": SAE, "top_k": 129}}, "steering.readings.top_k", "invalid_steering"),
        (
            {"on": [{"sae": SAE, "feature": 99_999, "above": 1, "action": "stop"}]},
            "steering.on[0].feature",
            "unknown_feature",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(client: httpx.Client, steering: Json, param: str, code: str) -> None:
    reply = post(client, steering)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code)


def test_a_client_that_leaves_frees_its_slot(vllm_server: VllmServer, client: httpx.Client) -> None:
    """As many as there are slots leave; then as many others are answered at once."""
    body = {"model": NAME, "messages": CHAT, "max_tokens": 300, "ignore_eos": True, "stream": True}
    for feature in range(8):
        body["steering"] = {"readings": {"sae": SAE, "features": [feature]}}
        with client.stream("POST", "/v1/chat/completions", json=body, timeout=120) as reply:
            next(reply.iter_lines())
    start = time.monotonic()
    answer(client, {"readings": {"sae": SAE, "features": [100]}})
    assert time.monotonic() - start < 60
    assert vllm_server.process.poll() is None


@pytest.mark.slow
def test_top_k_of_a_part_says_what_to_do(vllm_servers: Servers) -> None:
    config = plugin_config()
    config["saes"] = [config["saes"][0] | {"whole": False}]
    with vllm_servers.serve(Setup(config)) as server, httpx.Client(base_url=server.url) as client:
        reply = post(client, {"readings": READ})
        assert reply.status_code == 400
        assert '"whole": true' in reply.json()["error"]["message"]


def test_what_was_read_is_counted_beside_vllms_own_metrics(client: httpx.Client) -> None:
    flag = {"sae": SAE, "feature": SEA, "above": -1.0, "action": "flag"}
    answer(client, {"interventions": [CLAMP], "readings": READ, "on": [flag]})
    text = client.get("/metrics").text
    for name in ("reading_values_total", "trigger_fired_total", "feature_fired_total", "dose_bucket"):
        assert f"\nsae_steer_{name}" in text
