"""Servers that must not start, that lack a part, or whose engine dies: never an answer that is not steered."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from sae_steer import embedded
from tests.sae_files import write_saelens
from tests.vllm.conftest import (
    NAME,
    SAE,
    Ask,
    Choice,
    Servers,
    Setup,
    VllmServer,
    complete,
    environment_of,
    plugin_config,
)

pytestmark = pytest.mark.timeout(600)

Json = dict[str, Any]

STEERING = {"interventions": [{"sae": SAE, "features": [465], "op": "clamp", "value": 30.0}]}
BODY = {"model": NAME, "prompt": "a", "max_tokens": 2}


def test_without_the_endpoint_plugin_steering_is_refused(vllm_servers: Servers) -> None:
    # As when nobody sets the variable: vLLM then loads the general plugin, and no endpoint plugin.
    setup = Setup(plugin_config(), environment={"VLLM_PLUGINS": None})
    with vllm_servers.serve(setup) as server, server.http() as client:
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
            ("/v1/responses", {"model": NAME, "input": "a", "max_output_tokens": 2}),
            ("/tokenize", {"model": NAME, "prompt": "a"}),
        ):
            assert client.post(path, json=body).status_code == 200
            raw = json.dumps(body | {"steering": STEERING})
            for content in (raw.encode(), raw.replace("ste", "\\u0073te").encode(), raw.encode("utf-16")):
                refused = client.post(path, content=content, headers={"Content-Type": "application/json"})
                assert refused.status_code == 400, refused.text
            error = client.post(path, json=body | {"steering": STEERING}).json()["error"]
            assert (error["param"], error["code"]) == ("steering", "unsupported")
            assert "VLLM_PLUGINS=sae_steer" in error["message"]
        by_hand = client.post("/v1/completions", json=BODY | {"vllm_xargs": {"steering": json.dumps(STEERING)}})
        assert by_hand.status_code == 400
        assert client.post("/v1/completions", json=BODY | {"model": f"{NAME}:seaside"}).status_code == 404
        assert client.get("/v1/steering/saes").status_code == 404


def test_the_plugin_without_a_configuration_is_no_start(vllm_servers: Servers) -> None:
    log = vllm_servers.refused(Setup(None))
    assert "The plugin is named in VLLM_PLUGINS and has no configuration." in log
    assert "--additional-config" in log


def test_an_sae_of_another_width_is_no_start(vllm_servers: Servers, tmp_path: Path) -> None:
    write_saelens(tmp_path / "sae", architecture="standard", d_in=64, hook_name="blocks.3.hook_resid_post")
    config = plugin_config(saes=[{"name": "narrow", "location": str(tmp_path / "sae")}])
    log = vllm_servers.refused(Setup(config))
    assert "SAE 'narrow' reads vectors of width 64, and the model's resid_post.3 has width 192." in log


def digest_mismatch(folder: Path) -> Json:
    (folder / "steer.json").write_text(json.dumps(plugin_config()))
    return {"file": str(folder / "steer.json"), "digest": "sha256:" + "0" * 64}


def test_another_configuration_than_the_named_one_is_no_start(vllm_servers: Servers, tmp_path: Path) -> None:
    log = vllm_servers.refused(Setup(digest_mismatch(tmp_path)))
    assert "is not the one that was named" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (plugin_config(sites=["resid_post.6"]), (), "resid_post.6"),
        (plugin_config(sites=["resid_post"]), (), "resid_post"),
        (plugin_config(colour="red"), (), "colour"),
        (plugin_config(profiles="/nowhere"), (), "profiles: /nowhere is not a folder"),
        (plugin_config(limits={"max_programs": 0}), (), "limits.max_programs"),
        (
            plugin_config(),
            ("--speculative-config", '{"method":"ngram","num_speculative_tokens":2,"prompt_lookup_max":2}'),
            "Steering does not go together with --speculative-config",
        ),
        (plugin_config(), ("--served-model-name", NAME, f"{NAME}:seaside"), "is served already"),
    ],
)
def test_what_cannot_be_honoured_is_no_start(
    vllm_servers: Servers, config: Json, arguments: tuple[str, ...], message: str
) -> None:
    if "--served-model-name" in arguments:
        config = config | {"profiles": str(embedded.PROFILES)}
    assert message in vllm_servers.refused(Setup(config, arguments))


@pytest.mark.slow
def test_nothing_changes_profiles_without_an_admin_key(vllm_servers: Servers, tmp_path: Path) -> None:
    setup = Setup(plugin_config(profiles=str(tmp_path)), environment={"SAE_STEER_ADMIN_KEY": None})
    with vllm_servers.serve(setup) as server, server.http() as client:
        profile = {"name": "mine", **STEERING}
        for headers in ({}, {"X-Steering-Admin-Key": ""}):
            put = client.put("/v1/steering/profiles/mine", json=profile, headers=headers)
            assert (put.status_code, put.json()["error"]["code"]) == (403, "forbidden")
            assert client.delete("/v1/steering/profiles/mine", headers=headers).status_code == 403
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_batch_file_is_refused_where_it_asks_for_steering(tmp_path: Path) -> None:
    body = {"model": str(embedded.MODEL), "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body | extra}
        for name, extra in {
            "plain": {},
            "steered": {"steering": STEERING},
            "empty": {"steering": {}},
            "beam": {"steering": STEERING, "use_beam_search": True, "n": 2},
            "reserved": {"vllm_xargs": {"sae_steer_program": "{}"}},
            "garbage": {"vllm_xargs": {"steering": "{"}},
            "ticket": {"vllm_xargs": {"steering": "0" * 32}},
            "by hand": {"vllm_xargs": {"steering": json.dumps(STEERING)}},
            "beam by hand": {"vllm_xargs": {"steering": json.dumps(STEERING)}, "use_beam_search": True, "n": 2},
        }.items()
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    setup = Setup(plugin_config())
    command = [
        str(Path(sys.executable).with_name("vllm")), "run-batch", "-i", str(tmp_path / "in.jsonl"),
        "-o", str(tmp_path / "out.jsonl"), "--model", str(embedded.MODEL), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "64", "--additional-config", json.dumps({"sae_steer": setup.config}),
    ]  # fmt: skip
    environment = environment_of(setup, tmp_path)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    responses = {answer["custom_id"]: answer["response"] for answer in answers}
    assert len(responses) == len(lines)
    assert responses.pop("plain")["status_code"] == 200
    for name, response in responses.items():
        assert response["status_code"] == 400, f"{name}: {response}"
        assert "choices" not in (response["body"] or {})


def processes_called(servers: Servers, name: str) -> list[psutil.Process]:
    children = psutil.Process(servers.usual().process.pid).children(recursive=True)
    return [child for child in children if any(name in part for part in child.cmdline()[:1])]


def both_running(
    server: VllmServer, client: OpenAI, pool: ThreadPoolExecutor
) -> tuple[Future[Choice], openai.Stream[Any], list[Any]] | None:
    """A request, a stream and its first chunk, in an engine that is held between two steps; None = it was faster."""
    asked: Json = {"model": NAME, "prompt": [5] * 20, "max_tokens": 480, "temperature": 0}
    extra = {"steering": STEERING, "ignore_eos": True}
    with server.paused():
        whole = pool.submit(complete, client, Ask([5] * 20, STEERING), 480)
        opened = pool.submit(client.completions.create, **asked, stream=True, extra_body=extra)
        time.sleep(0.5)  # for the front end to hand both over
    stream = opened.result(60)
    came = [next(iter(stream))]
    with server.http() as http:
        http.post("/pause", params={"mode": "keep"}).raise_for_status()
        time.sleep(0.5)  # what has come to its end is answered
        if not whole.done():
            return whole, stream, came
        stream.close()
        http.post("/resume").raise_for_status()
    return None


@pytest.mark.parametrize("name", ["VLLM::EngineCore", pytest.param("VLLM::Worker", marks=pytest.mark.slow)])
def test_an_engine_that_dies_answers_nothing(vllm_servers: Servers, name: str) -> None:
    server = vllm_servers.usual()
    with server.openai() as client, ThreadPoolExecutor(2) as pool:
        whole, stream, came = next(filter(None, (both_running(server, client, pool) for _ in range(8))))
        (victim,) = processes_called(vllm_servers, name)
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            came.extend(stream)
        assert all(choice.finish_reason is None for chunk in came for choice in chunk.choices)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            whole.result(60)
        assert not server.healthy()
        for steering in (STEERING, None):
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                complete(client, Ask([5], steering), 2)
    server.process.wait(60)
