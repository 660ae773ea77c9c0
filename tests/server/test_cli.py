"""`sae-steer serve`: what it refuses in one line, and a real server from start to signal."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sae_steer.errors import StartError
from sae_steer.sites import Site
from sae_steer_server import load as load_module
from sae_steer_server.load import load, load_catalog, with_demo
from sae_steer_server.settings import LabelSource, SaeSource, Settings, VectorSource
from tests.sae_writers.gemma import write_scope

COMMAND = [sys.executable, "-m", "sae_steer_cli"]
# Wide, so that the help is not broken up; plain, so that words can be found in it.
PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=PLAIN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=./sae", SaeSource("a", "./sae")),
        ("a=./sae@resid_pre.3", SaeSource("a", "./sae", site=Site.parse("resid_pre.3"))),
        ("a=o/r", SaeSource("a", "o/r")),
        ("a=o/r/f/g#v1@mlp_in.5->mlp_out.5", SaeSource("a", "o/r/f/g", "v1", Site.parse("mlp_in.5->mlp_out.5"))),
        ("a.b-c=o/r#main", SaeSource("a.b-c", "o/r", "main")),
        ("a=./x=y", SaeSource("a", "./x=y")),
    ],
)
def test_an_sae_is_written_name_location_site(text: str, expected: SaeSource) -> None:
    assert SaeSource.parse(text) == expected


def test_a_folder_may_have_the_marks_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a@b#c"
    folder.mkdir()
    assert SaeSource.parse(f"x={folder}") == SaeSource("x", str(folder))
    assert SaeSource.parse(f"x={folder}@z.1") == SaeSource("x", str(folder), site=Site.parse("z.1"))


@pytest.mark.parametrize("text", ["", "a", "a=", "=x", "-a=x", "a b=x", "a=x@", "a=x@nowhere.1", "a/b=x"])
def test_a_badly_written_sae_is_refused(text: str) -> None:
    with pytest.raises(StartError, match="--sae"):
        SaeSource.parse(text)


def test_a_badly_written_vector_is_refused() -> None:
    with pytest.raises(StartError, match="--vector"):
        VectorSource.parse("honest")


def test_keys_are_not_shown(base_settings: Settings) -> None:
    assert "sesame" not in repr(Settings(model="m", api_key="open sesame", admin_key="sesame"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sae", "a"], "--sae 'a'"),
        (["--site", "nowhere.1"], "nowhere.1"),
        (["--host", "256.0.0.1"], "Cannot bind 256.0.0.1"),
        (["--port", "TAKEN"], "Cannot bind 127.0.0.1"),
        (["--device", "meta"], "--device 'meta'"),
        (["--profiles", "./no-such-folder"], "--profiles no-such-folder is not a folder"),
        (["--served-model-name", ""], "at least one character"),
        (["--features", "8", "--wide-features", "8"], "wider"),
        ([], "./nothing-here"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(arguments: list[str], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        free = [] if "--port" in arguments else ["--port", "0"]
        result = run("serve", "./nothing-here", *free, *(port if a == "TAKEN" else a for a in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1
    assert said[0].startswith("sae-steer: ")
    assert message in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere/at/all/model"}, "nowhere/at/all/model"),
        ({"saes": (SaeSource("a", "./nothing-here"),)}, "nothing-here"),
        ({"saes": (), "whole": frozenset("a")}, "--whole a"),
        ({"saes": (), "thresholds": frozenset("a")}, "--topk-threshold a"),
        ({"vectors": (VectorSource("a", Path("nothing.safetensors")),)}, "nothing.safetensors"),
        ({"device": "quantum"}, "quantum"),
        ({"max_model_len": 513}, "513"),
        ({"sites": (Site.parse("resid_post.2"),)}, "resid_post.2"),
    ],
)
def test_what_does_not_fit_refuses_the_start(base_settings: Settings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError, match=message):
        load(replace(base_settings, **change))


def test_demo_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="embedded model is not part of this installation"):
        with_demo(Settings(model="demo"), tmp_path)


def test_demo_is_the_embedded_folder(tmp_path: Path) -> None:
    for name in ("model", "sae", "profiles"):
        (tmp_path / name).mkdir()
    found = with_demo(Settings(model="demo"), tmp_path)
    assert found.model_names == ("demo",)
    assert found.saes == (SaeSource("embedded", str(tmp_path / "sae")),)
    assert found.profiles == tmp_path / "profiles"
    assert with_demo(Settings(model="other"), tmp_path) == Settings(model="other")


def write_profile(folder: Path, name: str, /, **change: Any) -> None:
    profile = {"name": name, "interventions": [{"sae": "last", "features": [3], "op": "ablate"}]} | change
    (folder / name).mkdir(parents=True)
    (folder / name / "profile.json").write_text(json.dumps(profile))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saes": {"last": "sha256:other"}}, "sha256:other"),
        ({"interventions": [{"sae": "first", "features": [3], "op": "ablate"}]}, "first"),
        ({"name": "angry"}, "angry"),
        ({"interventions": []}, "interventions"),
    ],
)
def test_a_profile_that_cannot_be_used_refuses_the_start(
    base_settings: Settings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_profile(tmp_path, "calm", **change)
    with pytest.raises(StartError, match=r"Profile 'calm' cannot be used.*" + message):
        load(replace(base_settings, profiles=tmp_path))


def test_a_profile_whose_model_name_is_taken_refuses_the_start(base_settings: Settings, tmp_path: Path) -> None:
    write_profile(tmp_path, "calm")
    with pytest.raises(StartError, match="m:calm"):
        load(replace(base_settings, profiles=tmp_path, served_names=("m", "m:calm")))


def test_pickled_weights_are_not_loaded(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((model_folder / name).read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(StartError, match="cannot be loaded"):
        load_module.load_model(Settings(model=str(tmp_path), device="cpu"))


class Running:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def end(self, number: signal.Signals) -> tuple[int, list[dict[str, Any]]]:
        """Sends a signal; returns the exit code and the log."""
        self.process.send_signal(number)
        _, logged = self.process.communicate(timeout=60)
        return self.process.returncode, [json.loads(line) for line in logged.splitlines() if line.startswith("{")]


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [*COMMAND, "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=PLAIN | environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"Serving (\S+) on (http://\S+)\n", line)
        assert match, line + (process.communicate(timeout=60)[1] if process.poll() is not None else "")
        yield Running(process, match[2])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_from_start_to_signal(
    model_folder: Path, sae_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [str(model_folder), "--sae", f"last={sae_folder}", "--whole", "last", "--kv-tokens", "1024"]
    with served(*arguments, "--profiles", str(tmp_path), SAE_STEER_API_KEY="open sesame") as running:
        with httpx.Client(base_url=running.url, headers={"Authorization": "Bearer open sesame"}) as client:
            steering = {"interventions": [{"sae": "last", "features": [3], "op": "ablate"}], "error": "drop"}
            body = {"model": "tiny", "prompt": "a most private prompt", "max_tokens": 3, "steering": steering}
            reply = client.post("/v1/completions", json=body, timeout=60)
            assert reply.status_code == 200, reply.text
            assert client.post("/v1/completions", json=body | {"colour": 1}).status_code == 400
        code, log = running.end(number)
    assert code == 0
    requests = [line for line in log if line["event"] == "request"]
    first, second = requests
    assert first["id"] == reply.headers["x-request-id"]
    assert first["program"] == reply.json()["steering"]["program"]
    assert (first["route"], first["status"], first["completion_tokens"]) == ("/v1/completions", 200, 3)
    assert (second["status"], second["code"]) == (400, "unknown_field")
    assert "serving" in [line["event"] for line in log]
    assert "private" not in json.dumps(log)
    assert "sesame" not in json.dumps(log)
    assert not [line for line in log if line["level"] in ("warning", "error")], log


def test_a_signal_ends_a_running_stream_with_an_error(model_folder: Path) -> None:
    with served(str(model_folder), "--shutdown-grace", "0", "--kv-tokens", "1024") as running:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_down"
        assert running.process.wait(60) == 0


def test_a_compressed_sae_is_served_by_its_conversion(base_settings: Settings, tmp_path: Path) -> None:
    path = write_scope(tmp_path / "scope", d_in=192, compressed=True)
    source = SaeSource("scope", str(path), None, Site.parse("resid_post.1"))
    settings = replace(base_settings, saes=(source,))
    with pytest.raises(StartError, match="sae-steer convert"):
        load_catalog(settings)
    (tmp_path / "cache").mkdir()
    catalog = load_catalog(replace(settings, convert_cache=tmp_path / "cache"))
    assert catalog.sae("scope").sae.spec.family == "canonical"


def test_labels_are_given_at_start(base_settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "more=.csv"
    path.write_text("feature,label\n3,the open sea\n31,a new one\n")
    source = LabelSource.parse(f"last={path}")
    assert source == LabelSource("last", path)
    catalog = load_catalog(replace(base_settings, labels=(source,)))
    found = [(entry.feature, entry.label, entry.reference_max) for _, entry in catalog.search_features("last", "", 9)]
    assert found == [(3, "the open sea", 2.0), (5, "a ship", None), (31, "a new one", None)]
    with pytest.raises(StartError, match="--labels first: there is no such SAE"):
        load_catalog(replace(base_settings, labels=(LabelSource("first", path),)))
    with pytest.raises(StartError, match="give the labels of an SAE once"):
        load_catalog(replace(base_settings, labels=(source, source)))
    with pytest.raises(StartError, match="is not NAME=LOCATION"):
        LabelSource.parse("labels.csv")
    path.write_text("feature,label\n3,a\n32,b\n")
    with pytest.raises(StartError, match="line 3: '32' is no feature of this SAE, which has 0 to 31"):
        load_catalog(replace(base_settings, labels=(source,)))
