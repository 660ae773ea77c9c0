"""The playground and the search on vLLM: the same page, from the same files, as the embedded server's."""

from importlib.resources import files

import httpx
import pytest

from sae_steer_http.routes_playground import POLICY
from tests.steered_models import all_features, embedded_model
from tests.vllm.conftest import SAE


def test_the_page_is_served(client: httpx.Client) -> None:
    folder = files("sae_steer_http").joinpath("playground")
    for path, name in (("/playground", "index.html"), ("/playground/main.js", "main.js")):
        reply = client.get(path)
        assert reply.status_code == 200
        assert reply.content == folder.joinpath(name).read_bytes()
        assert reply.headers["content-security-policy"] == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
    missing = client.get("/playground/none.js")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_features_are_searched_and_described(client: httpx.Client) -> None:
    found = client.get("/v1/steering/features", params={"sae": SAE, "q": "sea", "limit": 2}).json()["data"]
    assert (found[0]["feature"], found[0]["label"]) == (551, "the sea")
    known = client.get("/v1/steering/features", params={"sae": SAE, "ids": "103,551"}).json()["data"]
    assert [entry["feature"] for entry in known] == [103, 551]


def test_what_differs_between_two_texts(client: httpx.Client) -> None:
    texts = ["We sailed over the ocean.", "The train was late."]
    reply = client.post("/v1/steering/activations", json={"sae": SAE, "texts": texts, "top_k": 8})
    assert reply.status_code == 200, reply.text
    steered = embedded_model()
    first, second = (all_features(steered, text).amax(dim=0) for text in texts)
    wanted = (second - first).abs().topk(8).indices.tolist()
    assert [entry["feature"] for entry in reply.json()["data"]] == wanted
    for entry in reply.json()["data"]:
        on = [each["max"] for each in entry["on"]]
        assert on == pytest.approx([first[entry["feature"]].item(), second[entry["feature"]].item()], rel=1e-3)
    long = client.post("/v1/steering/activations", json={"sae": SAE, "text": "word " * 3000})
    assert (long.status_code, long.json()["error"]["param"]) == (400, "text")
    unknown = client.post("/v1/steering/activations", json={"sae": "none", "text": "a"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_sae")
