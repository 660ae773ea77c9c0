"""Closed bodies: what is not honoured is refused, with the path of the fault, and never silently ignored."""

import json
from typing import Any

import httpx
import pytest

COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def refusal(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"use_beam_search": True}, "use_beam_search", "unknown_field"),
        ({"Steering": {}}, "Steering", "unknown_field"),
        ({"~text": 1}, "~text", "unknown_field"),
        ({"best_of": 3}, None, "invalid_request"),
        ({"echo": True}, "echo", "unsupported"),
        ({"echo": True, "logprobs": 1}, "echo", "unsupported"),
        ({"echo": 0}, "echo", "unsupported"),
        ({"suffix": "x"}, "suffix", "unsupported"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported"),
        ({"presence_penalty": False}, "presence_penalty", "unsupported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported"),
        ({"store": True}, "store", "unsupported"),
        ({"n": 0}, "n", "invalid_request"),
        ({"n": True}, "n", "invalid_request"),
        ({"n": "2"}, "n", "invalid_request"),
        ({"temperature": 2.1}, "temperature", "invalid_request"),
        ({"temperature": "1"}, "temperature", "invalid_request"),
        ({"top_p": 0}, "top_p", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"seed": 2**63}, "seed", "invalid_request"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_request"),
        ({"stop": [""]}, "stop[0]", "invalid_request"),
        ({"logprobs": 21}, "logprobs", "invalid_request"),
        ({"stream": 1}, "stream", "invalid_request"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_request"),
        ({"stream": True, "stream_options": {"Include": 1}}, "stream_options.Include", "unknown_field"),
        ({"prompt": []}, "prompt", "invalid_request"),
        ({"prompt": [True]}, "prompt[0]", "invalid_request"),
        ({"prompt": ["a", 1]}, "prompt[1]", "invalid_request"),
        ({"prompt": [[1], []]}, "prompt[1]", "invalid_request"),
        ({"prompt": None}, "prompt", "invalid_request"),
        ({"prompt": "\ud800"}, None, "invalid_unicode"),
        ({"steering": None}, "steering", "invalid_steering"),
        ({"steering": {"interventions": [{"op": "explode"}]}}, "steering.interventions[0]", "unknown_op"),
        ({"steering": {"colour": 1}}, "steering.colour", "unknown_field"),
        ({"steering": {"dose": {"limit": True}}}, "steering.dose.limit", "invalid_steering"),
    ],
)
def test_completions_refuse(client: httpx.Client, extra: dict[str, Any], param: str | None, code: str) -> None:
    # Not json=: httpx could not send half a character, and a client that escapes it can.
    content = json.dumps(COMPLETION | extra)
    error = refusal(client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}))
    assert (error["param"], error["code"]) == (param, code), error["message"]


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"prompt": "a"}, "prompt", "unknown_field"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported"),
        ({"logprobs": 2}, "logprobs", "invalid_request"),
        ({"top_logprobs": 2}, None, "invalid_request"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, None, "invalid_request"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_request"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_field"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", "unknown_field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_request",
        ),
    ],
)
def test_chats_refuse(client: httpx.Client, extra: dict[str, Any], param: str | None, code: str) -> None:
    error = refusal(client.post("/v1/chat/completions", json=CHAT | extra))
    assert (error["param"], error["code"]) == (param, code), error["message"]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model": "tiny", "prompt": "a", "prompt": "b"}', "duplicate_key"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "non_finite_number"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "non_finite_number"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "too_deep"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep"),
        (b"[]", "invalid_request"),
        (b"3", "invalid_request"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_only_strict_json_is_read(client: httpx.Client, path: str, raw: bytes, code: str) -> None:
    error = refusal(client.post(path, content=raw, headers={"Content-Type": "application/json"}))
    assert error["code"] == code


def test_a_body_says_that_it_is_json(client: httpx.Client) -> None:
    error = refusal(client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}))
    assert error["code"] == "not_json"


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    for model in ("big", "tiny:", "tiny:calm", "TINY", ""):
        reply = client.post("/v1/completions", json=COMPLETION | {"model": model})
        assert reply.status_code == (404 if model else 400)
        assert reply.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/batches", "/v1/", "/"])
def test_other_routes_are_not_there(client: httpx.Client, path: str) -> None:
    reply = client.post(path, json=COMPLETION | {"steering": {"interventions": []}})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"


def test_a_wrong_method_says_which_are_right(client: httpx.Client) -> None:
    reply = client.get("/v1/completions")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"
