"""Readings and triggers over HTTP: whole answers and streams, the limits, and what a client may do wrong."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sae_steer.limits import Limits
from sae_steer.readings import extend
from tests.server.conftest import Serve, Served

CLAMP = {"sae": "last", "features": [3], "op": "clamp", "value": 6.0}
READ = {"sae": "last", "features": [3, 5], "top_k": 2, "positions": "all"}
PROMPT, NEW = "abc", 6
TOKENS = 1 + len(PROMPT)  # a beginning of sequence, and a token for each byte
LIMIT = 200


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    limits = Limits(max_programs=2, rows=8, wide_programs=1, wide_rows=16, max_edits=12, max_reading_values=LIMIT)
    with serve(whole=frozenset({"last"}), limits=limits) as running:
        yield running


def post(client: httpx.Client, steering: dict[str, Any] | None, **body: Any) -> httpx.Response:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0} | body
    if "messages" in asked:
        del asked["prompt"]
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    return client.post(path, json=asked | ({"steering": steering} if steering is not None else {}))


def answer(client: httpx.Client, steering: dict[str, Any] | None, **body: Any) -> dict[str, Any]:
    reply = post(client, steering, **body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(client: httpx.Client, steering: dict[str, Any], **body: Any) -> tuple[int, str | None, str]:
    reply = post(client, steering, **body)
    error = reply.json()["error"]
    return reply.status_code, error["param"], error["code"]


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    *lines, end = reply.text.split("\n\n")[:-1]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def rounded(value: Any) -> Any:
    """What neighbours in a batch change of a number is not what this is about."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def test_an_answer_has_what_was_read(client: httpx.Client) -> None:
    reply = answer(client, {"readings": [READ, {"sae": "last", "features": [3], "per_token": False}]})
    assert reply["steering"] == {"program": None}, "nothing was edited"
    block = reply["choices"][0]["steering"]
    first, second = block["readings"]
    assert first["positions"] == list(range(TOKENS + NEW - 1)), "the last token is never run through the model"
    assert first["text"][:TOKENS] == ["<s>", *PROMPT]
    assert "".join(first["text"][TOKENS:]) == reply["choices"][0]["text"][: NEW - 1]
    assert {len(first[key]) for key in ("tokens", "text", "values", "top")} == {TOKENS + NEW - 1}
    assert {len(values) for values in first["values"]} == {2}
    assert second.keys() == {"sae", "site", "at", "features", "summary"}
    assert second["summary"][0]["tokens"] == NEW
    assert block["applied"] == {
        "sites": [],
        "features": [],
        "tokens": 0,
        "fired": 0,
        "dose": {"max": 0.0, "mean": 0.0, "limited": 0},
    }
    assert (block["triggers"], block["trigger"]) == ([], None)


def test_reading_changes_no_answer(client: httpx.Client) -> None:
    """And the program that is told is that of the edits."""
    plain, reads = (answer(client, steering, logprobs=2) for steering in (None, {"readings": READ}))
    steered, both = (answer(client, {"interventions": [CLAMP]} | more, logprobs=2) for more in ({}, {"readings": READ}))
    for one, other in ((plain, reads), (steered, both)):
        assert one["choices"][0]["text"] == other["choices"][0]["text"]
        assert one["choices"][0]["logprobs"] == other["choices"][0]["logprobs"]
    assert steered["steering"] == both["steering"]
    assert steered["choices"][0]["steering"]["applied"] == both["choices"][0]["steering"]["applied"]
    assert "steering" not in plain


@pytest.mark.parametrize("prompt", [{"prompt": PROMPT}, {"messages": [{"role": "user", "content": PROMPT}]}])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_stream_tells_every_token_once_and_sums_up_at_the_end(
    client: httpx.Client, prompt: dict[str, Any], per_token: bool
) -> None:
    read = READ | {"positions": "completion"}
    steering = {"interventions": [CLAMP], "readings": [read | {"per_token": per_token}, read | {"at": "after"}]}
    whole = answer(client, steering, n=2, max_tokens=4, **prompt)
    told: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for event in events(post(client, steering, n=2, max_tokens=4, stream=True, **prompt)):
        choice = event["choices"][0]
        if "steering" not in choice:
            assert choice["delta"] == {"role": "assistant", "content": ""}, "every chunk with tokens says what was read"
            continue
        block = choice["steering"]
        assert ("applied" in block) == ("triggers" in block) == (choice["finish_reason"] is not None)
        if choice["finish_reason"] is None:
            assert not any("summary" in reading for reading in block["readings"])
        extend(told[choice["index"]], block["readings"])
    for choice in whole["choices"]:
        assert rounded(told[choice["index"]]) == rounded(choice["steering"]["readings"])


def test_a_stream_without_tokens_to_tell_is_silent_until_its_end(client: httpx.Client) -> None:
    steering = {"readings": READ | {"per_token": False}}
    told = [event["choices"][0].get("steering") for event in events(post(client, steering, stream=True))]
    assert not any(told[:-1])
    assert told[-1]["readings"][0]["summary"]


def test_a_trigger_ends_the_answer_behind_the_token_sampled_there(client: httpx.Client) -> None:
    whole = answer(client, {"readings": READ | {"features": list(range(8)), "top_k": 0, "positions": "completion"}})
    read = whole["choices"][0]["steering"]["readings"][0]
    # A feature whose maximum is reached in the middle of the answer.
    sums = next(s for s in read["summary"] if TOKENS - 1 < s["argmax"] < TOKENS + NEW - 3)
    others = [row[read["features"].index(sums["feature"])] for row in read["values"]]
    above = sorted(others)[-2]
    on = [{"sae": "last", "feature": sums["feature"], "above": above, "action": action} for action in ("flag", "stop")]
    for stream in (False, True):
        body = {"on": on}
        if stream:
            found = events(post(client, body, stream=True, stream_options={"include_usage": True}))
            choice = found[-2]["choices"][0]
            text, usage = "".join(e["choices"][0]["text"] for e in found[:-1]), found[-1]["usage"]
        else:
            reply = answer(client, body)
            [choice], usage = reply["choices"], reply["usage"]
            text = choice["text"]
        kept = sums["argmax"] - (TOKENS - 1) + 1
        assert usage["completion_tokens"] == kept, "the token sampled at the firing position is the last"
        assert text == whole["choices"][0]["text"][:kept]
        assert choice["finish_reason"] == "stop"
        block = choice["steering"]
        wanted = {"fired": 1, "first": sums["argmax"], "value": sums["max"]}
        assert block["triggers"] == [trigger | wanted for trigger in on]
        assert block["trigger"] == block["triggers"][1]


def test_a_flag_ends_nothing(client: httpx.Client) -> None:
    on = [{"sae": "last", "feature": 3, "above": -1.0, "action": "flag"}]
    reply = answer(client, {"on": on})
    assert reply["choices"][0]["finish_reason"] == "length"
    block = reply["choices"][0]["steering"]
    assert block["triggers"][0]["fired"] == NEW
    assert block["trigger"] is None


MANY = list(range(32))


@pytest.mark.parametrize(
    ("steering", "param", "code"),
    [
        ({"readings": {"sae": "first", "features": [1]}}, "steering.readings.sae", "unknown_sae"),
        ({"readings": {"sae": "last", "features": [32]}}, "steering.readings.features[0]", "unknown_feature"),
        (
            {"readings": {"sae": "last", "features": [1] * 7000}},
            "steering.readings.features",
            "invalid_steering",
        ),
        ({"readings": {"sae": "last", "features": MANY}}, "steering.readings", "limit_exceeded"),
        ({"readings": {"sae": "last", "top_k": 33}}, "steering.readings.top_k", "out_of_range"),
        ({"readings": {"sae": "last", "top_k": 129}}, "steering.readings.top_k", "invalid_steering"),
        ({"readings": {"sae": "last", "top_k": 32, "positions": "all"}}, "steering.readings", "limit_exceeded"),
        ({"readings": {"sae": "last", "features": [1, 1]}}, "steering.readings", "invalid_steering"),
        ({"readings": []}, "steering.readings", "invalid_steering"),
        ({"readings": [READ] * 9}, "steering.readings", "invalid_steering"),
        ({"on": [{"sae": "first", "feature": 1, "above": 1, "action": "stop"}]}, "steering.on[0].sae", "unknown_sae"),
        (
            {"on": [{"sae": "last", "feature": 32, "above": 1, "action": "stop"}]},
            "steering.on[0].feature",
            "unknown_feature",
        ),
        (
            {"on": [{"sae": "last", "feature": 1, "above": 1, "action": "cry"}]},
            "steering.on[0].action",
            "invalid_steering",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(client: httpx.Client, steering: dict[str, Any], param: str, code: str) -> None:
    assert refusal(client, steering) == (400, param, code)


def test_the_limit_counts_tokens_times_values_of_all_choices(client: httpx.Client) -> None:
    per_choice = (TOKENS + NEW - 1) * 4
    assert LIMIT // per_choice == 5
    assert len(answer(client, {"readings": READ}, n=5)["choices"]) == 5
    assert refusal(client, {"readings": READ}, n=6) == (400, "steering.readings", "limit_exceeded")
    assert refusal(client, {"readings": READ}, prompt=[PROMPT] * 6) == (400, "steering.readings", "limit_exceeded")
    answer(client, {"readings": READ | {"per_token": False}}, n=6)


def test_an_answer_of_unknown_length_ends_with_an_error_and_is_never_cut(client: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": None}
    read = {"readings": {"sae": "last", "features": [3], "positions": "completion"}}
    assert refusal(client, read, **chat) == (422, "steering.readings", "limit_exceeded")
    stream = post(client, read, stream=True, **chat)
    assert stream.status_code == 200
    *whole, last = stream.text.split("\n\n")[:-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "limit_exceeded"
    assert sum("steering" in json.loads(line.removeprefix("data: "))["choices"][0] for line in whole) == LIMIT
    answer(client, {"readings": READ})


def test_a_client_that_leaves_frees_everything(client: httpx.Client, served: Served) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 49, "stream": True, "steering": {"readings": READ}}
    body["steering"]["readings"] = READ | {"positions": "completion"}
    with client.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_lines())
    until = time.monotonic() + 30
    engine = served.state.engine
    while engine._runtime.slots_in_use or engine._steps.requests:
        assert time.monotonic() < until
        time.sleep(0.01)
    answer(client, {"readings": READ})


def test_top_k_of_a_part_says_what_to_do(serve: Serve) -> None:
    with serve() as running, running.http() as client:
        reply = post(client, {"readings": {"sae": "last", "top_k": 1}})
        assert "--whole last" in reply.json()["error"]["message"]
        table = {row["key"]: row for row in client.get("/v1/steering/capabilities").json()["data"]}
        assert all(table[key]["supported"] for key in ("readings", "on", "on.stop"))


def test_the_limits_are_published(client: httpx.Client) -> None:
    limits = client.get("/v1/steering/capabilities").json()["limits"]
    assert (limits["max_reading_values"], limits["max_read_features"], limits["max_top_k"]) == (LIMIT, 1024, 128)


def test_what_was_read_is_counted(client: httpx.Client) -> None:
    def counted() -> dict[str, float]:
        lines = [line.rpartition(" ") for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    before = counted()
    flag = {"sae": "last", "feature": 3, "above": -1.0, "action": "flag"}
    answer(client, {"interventions": [CLAMP], "readings": READ, "on": [flag]})
    after = counted()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    count = TOKENS + NEW - 1
    assert grown("sae_steer_reading_values_total") == count * 4
    assert grown('sae_steer_trigger_fired_total{action="flag"}') == NEW
    assert grown('sae_steer_feature_fired_total{feature="3",sae="last",what="edited"}') == count
    assert grown("sae_steer_dose_count") == 1
