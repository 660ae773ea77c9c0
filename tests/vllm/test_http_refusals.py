"""What vLLM's server refuses with the plugin: the embedded server's refusals, and every way around the field."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sae_steer.limits import Limits
from sae_steer_server.settings import Settings
from tests.server.conftest import Served
from tests.vllm.conftest import ADMIN_KEY, LIMITS, MAX_BODY, NAME, SAE, Ask, VllmServer, complete

pytestmark = pytest.mark.timeout(600)

Json = dict[str, Any]

CLAMP = {"sae": SAE, "features": [465], "op": "clamp", "value": 30.0}
STEERING = {"interventions": [CLAMP]}
BODY = {"model": NAME, "prompt": "a", "max_tokens": 2}
ADMIN = {"X-Steering-Admin-Key": ADMIN_KEY}
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def embedded_client() -> Iterator[httpx.Client]:
    """The embedded server with the same model, limits and keys."""
    limits = Limits(
        max_programs=LIMITS["max_programs"],
        rows=LIMITS["features"],
        wide_programs=LIMITS["wide_programs"],
        wide_rows=LIMITS["wide_features"],
    )
    served = Served(
        Settings(model="demo", device="cpu", port=0, limits=limits, admin_key=ADMIN_KEY, max_body_bytes=MAX_BODY)
    )
    with served.http() as client:
        yield client
    served.stop()


def wire(reply: httpx.Response) -> tuple[int, str | None, str | None, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"], error["type"]


@pytest.fixture
def serves(vllm_server: VllmServer) -> Iterator[None]:
    """After the test, the server still answers, steered and plain."""
    yield
    with vllm_server.openai() as client:
        assert complete(client, Ask([5, 6, 7], STEERING), 2).applied["fired"] == 4
        assert complete(client, Ask([5, 6, 7]), 2).applied is None


GOOD_RANGES = {"ranges": [[0, 3]]}
BAD_STEERING: list[Any] = [
    None,
    [],
    "calm",
    3,
    {"colour": 1},
    {"interventions": {}},
    {"interventions": [{}]},
    {"interventions": [{"op": "explode"}]},
    {"interventions": [CLAMP | {"op": ["clamp"]}]},
    {"interventions": [CLAMP | {"sae": "other"}]},
    {"interventions": [CLAMP | {"sae": ""}]},
    {"interventions": [CLAMP | {"features": []}]},
    {"interventions": [CLAMP | {"features": [768]}]},
    {"interventions": [CLAMP | {"features": [-1]}]},
    {"interventions": [CLAMP | {"features": ["465"]}]},
    {"interventions": [CLAMP | {"features": [465, 465]}]},
    {"interventions": [CLAMP | {"features": list(range(33))}]},
    {"interventions": [CLAMP | {"features": list(range(600))}]},
    {"interventions": [CLAMP | {"value": True}]},
    {"interventions": [CLAMP | {"value": "30"}]},
    {"interventions": [CLAMP | {"value": 1e13}]},
    {"interventions": [CLAMP | {"value": [1.0, 2.0]}]},
    {"interventions": [CLAMP | {"units": "metres"}]},
    {"interventions": [CLAMP | {"values": 3}]},
    {"interventions": [CLAMP | {"positions": "everywhere"}]},
    {"interventions": [CLAMP | {"positions": {"ranges": [[3, 3]]}}]},
    {"interventions": [CLAMP | {"positions": GOOD_RANGES | {"skip_bos": True}}]},
    {"interventions": [CLAMP | {"when": {}}]},
    {"interventions": [CLAMP | {"when": {"sae": "other", "feature": 1, "above": 0}}]},
    {"interventions": [CLAMP, CLAMP]},
    {"interventions": [{"sae": SAE, "features": [1], "op": "mask_range", "lo": 2, "hi": 1}]},
    {"interventions": [{"sae": SAE, "op": "app", "calibration": "c", "concept": "d"}]},
    {"interventions": [{"site": "resid_post.3", "vector": "honest", "op": "add", "value": 1.0}]},
    {"interventions": [CLAMP | {"skip_bos": 1}]},
    {"profiles": ["none"]},
    {"profiles": ["../seaside"]},
    {"profiles": ["seaside", "seaside"]},
    {"profiles": ["seaside"], "interventions": [CLAMP | {"features": [551]}]},
    {"error": "lose", "interventions": [CLAMP]},
    {"dose": {"limit": 0}, "interventions": [CLAMP]},
    {"dose": {"limit": True}, "interventions": [CLAMP]},
    {"dose": {"limit": 1, "on_dose": "cry"}, "interventions": [CLAMP]},
    {"readings": {"sae": SAE}, "interventions": [CLAMP]},
    {"readings": {"sae": "other", "features": [1]}},
    {"readings": {"sae": SAE, "features": [768]}},
    {"readings": {"sae": SAE, "features": [1, 1]}},
    {"readings": {"sae": SAE, "top_k": 129}},
    {"readings": []},
    {"on": [{"sae": SAE, "feature": 1, "above": 1, "action": "cry"}]},
    {"on": [{"sae": SAE, "feature": 768, "above": 1, "action": "stop"}]},
]


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_steering_is_refused_as_the_embedded_server_does(
    client: httpx.Client, embedded_client: httpx.Client, path: str
) -> None:
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    for steering in BAD_STEERING:
        for model in (NAME, f"{NAME}:seaside"):
            body = {"model": model, "max_tokens": 2, "steering": steering} | prompt
            mine, its = client.post(path, json=body), embedded_client.post(path, json=body)
            assert wire(mine) == wire(its), f"{model} {steering}"
            assert mine.json() == its.json()
            assert mine.status_code == 400


RAW: list[tuple[str, int, str]] = [
    ('{"model":"demo","prompt":"a","steering":{},"steering":{"profiles":["seaside"]}}', 400, "duplicate_key"),
    ('{"model":"demo","prompt":"a","steering":{"profiles":[],"profiles":[]}}', 400, "duplicate_key"),
    ('{"model":"demo","model":"demo:seaside","prompt":"a"}', 400, "duplicate_key"),
    ('{"model":"demo","prompt":"a","steering":{"dose":{"limit":1e999}}}', 400, "non_finite_number"),
    ('{"model":"demo","prompt":"a","steering":{"dose":{"limit":NaN}}}', 400, "non_finite_number"),
    ('{"model":"demo","prompt":"a","steering":{"dose":{"limit":-Infinity}}}', 400, "non_finite_number"),
    ('{"model":"demo","prompt":"a","\\u0073teering":{"colour":1}}', 400, "unknown_field"),
    ('{"model":"demo","prompt":"a","\\u0073\\u0074\\u0065\\u0065ring":{},"steering":{}}', 400, "duplicate_key"),
    ('{"model":"demo","prompt":"\\ud800","steering":{}}', 400, "invalid_unicode"),
    ('{"model":"demo","prompt":"a","steering":' + "[" * 100 + "]" * 100 + "}", 400, "too_deep"),
    ('{"model":"demo","n":"2","prompt":["a","b"],"temperature":1,"steering":{}}', 400, "invalid_request"),
    ('{"model":"demo","n":2.0,"prompt":["a","b"],"temperature":1,"steering":{}}', 400, "invalid_request"),
    ('{"model":"demo","prompt":"' + "a" * MAX_BODY + '","steering":{}}', 413, "body_too_large"),
]


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize(("raw", "status", "code"), RAW, ids=[raw[:70] for raw, _, _ in RAW])
def test_only_strict_json_steers(
    client: httpx.Client, embedded_client: httpx.Client, raw: str, status: int, code: str
) -> None:
    for host in (client, embedded_client):
        reply = host.post("/v1/completions", content=raw, headers=JSON_TYPE)
        assert wire(reply)[:2] == (status, code)


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/completions", {"steering": STEERING}),
        ("/v1/completions", {"model": f"{NAME}:seaside"}),
        ("/v1/completions", {"vllm_xargs": {"steering": json.dumps(STEERING)}}),
        ("/v1/responses", {"steering": STEERING, "input": "a"}),
        ("/tokenize", {"steering": STEERING}),
    ],
)
def test_another_encoding_hides_nothing(client: httpx.Client, encoding: str, path: str, extra: Json) -> None:
    reply = client.post(path, content=json.dumps(BODY | extra).encode(encoding), headers=JSON_TYPE)
    assert wire(reply)[:2] == (400, "invalid_json")


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (json.dumps(BODY | {"steering": STEERING}), "text/plain"),
        (json.dumps(BODY | {"steering": STEERING}), "application/x-ndjson"),
        (json.dumps(BODY | {"steering": STEERING}), "multipart/form-data; boundary=x"),
        ("model=demo&prompt=a&steering=%7B%7D", "application/x-www-form-urlencoded"),
        ('{"model":"demo","prompt":"a","steering":' + "[" * 20000 + "]" * 20000 + "}", "application/json"),
        ('{"model":"demo","prompt":"a","steering":', "application/json"),
        ('{"model":"demo","prompt":"a","steering":{}}{}', "application/json"),
        ('[{"model":"demo","prompt":"a","steering":{}}]', "application/json"),
        ('"steering"', "application/json"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_no_json_object_is_never_answered(client: httpx.Client, path: str, content: str, kind: str) -> None:
    reply = client.post(path, content=content, headers={"Content-Type": kind})
    assert reply.status_code in (400, 415, 422), reply.text


# Of vLLM 0.26 to 0.32, also those that this model or this command line does not have.
ROUTES = """
/v1/chat/completions/batch /v1/chat/completions/render /v1/chat/completions/derender /v1/completions/render
/v1/completions/derender /v1/responses /v1/responses/render /v1/responses/resp_1/cancel /v1/messages
/v1/messages/count_tokens /v1/messages/render /cohere/v2/chat /generative_scoring /v1/systemone /inference/v1/generate
/inference/v1/abort_requests /tokenize /detokenize /classify /v1/embeddings /v2/embed /pooling /score /v1/score /rerank
/v1/rerank /v2/rerank /v1/audio/transcriptions /v1/audio/translations /invocations /ping /v1/load_lora_adapter
/v1/unload_lora_adapter /scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/apply /start_profile /stop_profile
/abort_requests /reset_prefix_cache /reset_mm_cache /reset_encoder_cache /release_kv_cache_memory /collective_rpc /sleep
/wake_up /pause /resume /weight_checker /init_weight_transfer_engine /shutdown_weight_transfer_engine
/start_weight_update /start_draft_weight_update /update_weights /finish_weight_update /update_weight_version
/v1/chat/completions/ /v1/completions/ //v1/completions /v1 /
"""
MINE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/steering/activations",
    "/v1/steering/profiles/{name}",
)
XARGS = ("steering", "sae_steer_program", "sae_steer_slot", "sae_steer_ticket")
MESSAGES = [{"role": "user", "content": "a"}]
ANSWERED: dict[str, Json] = {
    "/v1/responses": {"model": NAME, "input": "a", "max_output_tokens": 1},
    "/v1/messages": {"model": NAME, "messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": NAME, "messages": MESSAGES},
    "/v1/chat/completions/batch": {"model": NAME, "messages": [MESSAGES], "max_tokens": 1},
    "/tokenize": {"model": NAME, "prompt": "a"},
    "/detokenize": {"model": NAME, "tokens": [5]},
    "/invocations": BODY,
    "/reset_prefix_cache": {},
}
"""Bodies that are answered with 200 as they are."""


def routes(client: httpx.Client) -> list[tuple[str, str]]:
    """Every route that takes a body, but those that steer."""
    found = {
        (method.upper(), path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
        if method in ("post", "put", "patch") and path not in MINE
    }
    assert ("POST", "/v1/responses") in found
    assert ("POST", "/collective_rpc") in found
    return sorted(found | {("POST", path) for path in ROUTES.split()})


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"steering": STEERING}, "steering", "unsupported"),
        ({"steering": {}}, "steering", "unsupported"),
        ({"steering": None}, "steering", "unsupported"),
        ({"model": f"{NAME}:seaside"}, "steering", "unsupported"),
        *(({"vllm_xargs": {key: "{}"}}, f"vllm_xargs.{key}", "reserved") for key in XARGS),
    ],
)
def test_every_other_route_refuses(client: httpx.Client, extra: Json, param: str, code: str) -> None:
    for method, path in routes(client):
        reply = client.request(method, path, json=ANSWERED.get(path, BODY) | extra)
        assert wire(reply)[:3] == (400, code, param), f"{method} {path}"


@pytest.mark.parametrize("path", ANSWERED)
def test_other_routes_answer_what_is_plain(client: httpx.Client, path: str) -> None:
    reply = client.post(path, json=ANSWERED[path])
    assert reply.status_code == 200, f"a refusal of it would mean nothing: {reply.text}"


GARBAGE: list[Any] = ["", "{}", "null", "\x00", json.dumps(STEERING), 0, -1, 1e300, [], [0, 0], ["{}"], "0" * 32, True,
                      None, {}]  # fmt: skip


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize("key", XARGS)
def test_the_plugins_own_arguments_cannot_be_written_by_hand(client: httpx.Client, key: str) -> None:
    for value in GARBAGE:
        for extra in ({}, {"steering": STEERING}, {"model": f"{NAME}:seaside"}):
            for path, prompt in (("/v1/completions", {}), ("/v1/chat/completions", {"messages": MESSAGES})):
                raw = json.dumps(BODY | prompt | extra | {"vllm_xargs": {key: value, "other": 1}})
                for content in (raw, raw.replace("ste", "\\u0073te")):
                    reply = client.post(path, content=content, headers=JSON_TYPE)
                    assert wire(reply)[:3] == (400, "reserved", f"vllm_xargs.{key}"), content


def test_arguments_of_others_are_left_alone(client: httpx.Client) -> None:
    for extra in ({}, {"steering": STEERING}):
        assert client.post("/v1/completions", json=BODY | extra | {"vllm_xargs": {"other": 1}}).status_code == 200
    for bad in ("x", [1], 3):
        body = BODY | {"steering": STEERING, "vllm_xargs": bad}
        assert client.post("/v1/completions", json=body).status_code == 400


@pytest.mark.usefixtures("serves")
@pytest.mark.parametrize("extra", [{"steering": STEERING}, {"model": f"{NAME}:seaside"}])
@pytest.mark.parametrize("beam", [True, 1, "true"])
def test_beam_search_is_refused(client: httpx.Client, extra: Json, beam: Any) -> None:
    for path, prompt in (("/v1/completions", {}), ("/v1/chat/completions", {"messages": MESSAGES})):
        reply = client.post(path, json=BODY | prompt | {"use_beam_search": beam, "n": 2} | extra)
        assert wire(reply)[:3] == (400, "unsupported", "use_beam_search")
    plain = client.post("/v1/completions", json=BODY | {"use_beam_search": True, "n": 2, "logprobs": 2})
    assert plain.status_code == 200, "vLLM's own is there"


def test_an_unknown_model_is_vllms_to_refuse(client: httpx.Client) -> None:
    for model in ("demo:", "demo:none", "DEMO:seaside", "demo:seaside ", ":seaside"):
        for extra in ({}, {"steering": STEERING}):
            reply = client.post("/v1/completions", json=BODY | {"model": model} | extra)
            assert reply.status_code == 404, model


QUERIES = ["saes", "profiles", "profiles/seaside", "profiles/none", "schema", "features", "features?q=SEA&limit=2",
           "features?sae=none", "features?sae=embedded&q=trains"]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_the_catalog_is_that_of_the_embedded_server(
    client: httpx.Client, embedded_client: httpx.Client, query: str
) -> None:
    mine, its = (host.get(f"/v1/steering/{query}") for host in (client, embedded_client))
    assert mine.status_code == its.status_code
    assert mine.json() == its.json()


def test_bad_queries_are_refused(client: httpx.Client) -> None:
    for query in ("limit=0", "limit=x", "colour=1", "q=" + "a" * 300):
        assert client.get(f"/v1/steering/features?{query}").status_code == 400


def test_capabilities_say_what_this_host_can(client: httpx.Client, embedded_client: httpx.Client) -> None:
    mine, its = (host.get("/v1/steering/capabilities").json() for host in (client, embedded_client))
    assert (mine["host"], its["host"]) == ("vllm", "transformers")
    alike = {
        "max_programs",
        "max_wide_programs",
        "max_ordinary_edits_per_site",
        "max_edits",
        "max_edits_per_site",
        "max_body_bytes",
        "max_model_len",
    }
    assert {key: mine["limits"][key] for key in alike} == {key: its["limits"][key] for key in alike}
    rows = {row["key"]: row["supported"] for row in mine["data"]}
    assert rows == {row["key"]: row["supported"] for row in its["data"]} | {"prefix_cache": True}


BAD_PROFILES: list[Json] = [
    {"interventions": [CLAMP | {"sae": "other"}]},
    {"interventions": [CLAMP, CLAMP]},
    {"interventions": []},
    {"saes": {SAE: "sha256:other"}},
    {"name": "../../bad"},
    {"name": "worse"},
    {"colour": 1},
]


def test_a_bad_profile_is_refused_as_the_embedded_server_does(
    client: httpx.Client, embedded_client: httpx.Client
) -> None:
    for change in BAD_PROFILES:
        body = {"name": "bad", "interventions": [CLAMP]} | change
        replies = [
            host.put("/v1/steering/profiles/bad", json=body, headers=ADMIN) for host in (client, embedded_client)
        ]
        assert wire(replies[0]) == wire(replies[1])
        assert replies[0].status_code == 400
    for key in ({}, {"X-Steering-Admin-Key": "wrong"}):
        for method in ("PUT", "DELETE"):
            replies = [
                host.request(method, "/v1/steering/profiles/seaside", headers=key) for host in (client, embedded_client)
            ]
            assert wire(replies[0]) == wire(replies[1])
            assert replies[0].status_code == 401
    assert "bad" not in client.get("/v1/steering/profiles").text
