"""The two generation routes: OpenAI's forms, through OpenAI's own client, over the real engine."""

import json
import math
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tokenizers.pre_tokenizers import ByteLevel

from tests.server.conftest import Served

CHAT = [{"role": "user", "content": "What is the sea?"}]


@pytest.fixture
def openai(served: Served) -> OpenAI:
    return served.openai()


def post(client: httpx.Client, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "max_tokens": 6, "temperature": 0} | body
    reply = client.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def texts(client: httpx.Client, **body: Any) -> list[str]:
    return [choice["text"] for choice in post(client, **body)["choices"]]


def test_openai_client_lists_models(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").id == "tiny"


def test_openai_client_chats(openai: OpenAI) -> None:
    reply = openai.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=5, seed=1)
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5


def test_openai_client_sends_an_answer_back(openai: OpenAI) -> None:
    first = openai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)
    again = [*CHAT, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Go on"}]}]
    assert openai.chat.completions.create(model="tiny", messages=again, max_tokens=3).usage.completion_tokens == 3


def logged(choice: Any) -> list[tuple[str, float]]:
    """The sampled tokens, each followed by the likely ones."""
    entries = choice.logprobs.content if choice.logprobs else []
    return [(each.token, each.logprob) for entry in entries for each in (entry, *entry.top_logprobs)]


def test_openai_client_streams_what_it_gets_whole(openai: OpenAI) -> None:
    asked = {
        "model": "tiny",
        "messages": CHAT,
        "max_tokens": 12,
        "seed": 7,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = openai.chat.completions.create(**asked)
    parts = ["", ""]
    entries: list[list[tuple[str, float]]] = [[], []]
    usage = None
    for event in openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = event.usage
        for choice in event.choices:
            parts[choice.index] += choice.delta.content or ""
            entries[choice.index] += logged(choice)
    assert parts == [choice.message.content for choice in whole.choices]
    for found, choice in zip(entries, whole.choices, strict=True):
        assert [token for token, _ in found] == [token for token, _ in logged(choice)]
        # How many sequences share a forward pass decides the last digits.
        assert [value for _, value in found] == pytest.approx([value for _, value in logged(choice)], abs=1e-4)
    assert usage == whole.usage


def test_openai_client_completes_a_stream(openai: OpenAI) -> None:
    asked = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 9, "seed": 3, "logprobs": 2}
    whole = openai.completions.create(**asked)
    parts = ["", ""]
    offsets: list[list[int]] = [[], []]
    for event in openai.completions.create(**asked, stream=True):
        for choice in event.choices:
            parts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset or []
    assert parts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_all_kinds_of_prompt_mean_the_same(client: httpx.Client) -> None:
    ids = [0, *(symbol_id(letter) for letter in "ab")]
    (text,) = texts(client, prompt="ab")
    assert texts(client, prompt=["ab"]) == [text]
    assert texts(client, prompt=ids) == [text]
    assert texts(client, prompt=[ids, ids], n=2) == [text] * 4


def symbol_id(letter: str) -> int:
    """A letter's id in the byte tokenizer: its place among the printable stand-ins for bytes, after <s>."""
    return sorted(ByteLevel.alphabet()).index(letter) + 1


def test_choices_differ_and_seeds_repeat(client: httpx.Client) -> None:
    asked = {"prompt": "ab", "temperature": 1.5, "n": 3, "max_tokens": 16}
    first = texts(client, **asked, seed=5)
    assert len(set(first)) == 3
    assert texts(client, **asked, seed=5) == first
    assert texts(client, **asked, seed=6) != first
    assert texts(client, **(asked | {"n": 1}), seed=5) == first[:1], "the first choice is the one of n = 1"
    assert texts(client, **(asked | {"n": 1}), seed=-5) != first[:1]
    assert texts(client, **asked) != texts(client, **asked), "without a seed every request has its own"


def test_stop_ends_before_its_text(client: httpx.Client) -> None:
    (text,) = texts(client, prompt="ab", temperature=1, seed=2, max_tokens=30)
    stop = text[4]
    reply = post(client, prompt="ab", temperature=1, seed=2, max_tokens=30, stop=stop)
    assert reply["choices"][0]["text"] == text.partition(stop)[0]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert texts(client, prompt="ab", temperature=1, seed=2, max_tokens=30, stop=["\x00never", stop]) == [
        text.partition(stop)[0]
    ]


def test_completion_logprobs_are_in_the_form_of_completions(client: httpx.Client) -> None:
    found = post(client, prompt="ab", logprobs=3)["choices"][0]["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert all(len(found[key]) == 6 for key in found)
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values()), "greedy takes the likeliest"
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
    lengths = [0, *(len(token) for token in found["tokens"])]
    assert found["text_offset"] == [sum(lengths[: i + 1]) for i in range(6)]
    assert post(client, prompt="ab")["choices"][0]["logprobs"] is None


def test_chat_logprobs_are_in_the_form_of_chats(client: httpx.Client) -> None:
    found = post(client, messages=CHAT, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert len(found["content"]) == 6
    for entry in found["content"]:
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
        assert len(entry["top_logprobs"]) == 2
        whole = "\ufffd" not in entry["token"]
        assert entry["bytes"] == (list(entry["token"].encode()) if whole else None)
    assert post(client, messages=CHAT, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert post(client, messages=CHAT)["choices"][0]["logprobs"] is None


def test_defaults_are_openais(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "a"}).json()
    assert reply["usage"]["completion_tokens"] == 16
    reply = client.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT}).json()
    assert reply["usage"]["total_tokens"] == 512, "a chat goes on to the end of the context"


def test_neutral_values_are_accepted(client: httpx.Client) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "store": False}
    post(client, prompt="a", **neutral, best_of=2, n=2, echo=False, suffix=None, metadata={"a": "b"})
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": None}
    post(client, messages=CHAT, **neutral, **chat)


def test_unsteered_answers_say_nothing_of_steering(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "steering": {}})
    assert "steering" not in reply.text
    assert "x-steering-program" not in reply.headers


def test_a_stream_is_server_sent_events(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 3, "stream": True}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert "usage" not in reply.text
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "a", "max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "a" * 600}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [3, 257]}, "prompt[1]", "unknown_token"),
        ({"prompt": [[3], [3, 257]]}, "prompt[1][1]", "unknown_token"),
        ({"prompt": "a", "n": 7}, "n", "limit_exceeded"),
        ({"prompt": ["a"] * 3, "n": 3}, "n", "limit_exceeded"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages", "invalid_messages"),
    ],
)
def test_what_does_not_fit_is_refused(client: httpx.Client, body: dict[str, Any], param: str, code: str) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    reply = client.post(path, json={"model": "tiny"} | body)
    assert reply.status_code == 400, reply.text
    assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == (param, code)


def test_a_model_without_a_chat_template_says_so(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.state.tokenizer, "chat_template", None)
    reply = client.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "no_chat_template"
    assert "/v1/completions" in reply.json()["error"]["message"]
