"""``sae-steer bench serve`` on vLLM, with vLLM's own load generator, which starts anew for each measurement."""

import gzip
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sae_steer import embedded
from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.launch import Port
from sae_steer_bench.load import Address
from sae_steer_bench.load_vllm import VllmLoad
from sae_steer_bench.options import Options, Watch
from sae_steer_bench.report import load
from sae_steer_bench.run import Run
from tests.vllm.conftest import ADMIN_KEY, Setup, VllmServer, environment_of, plugin_config, serve_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """An eager server that stores profiles and can be traced."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "profiles").mkdir()
    profiler = {
        "profiler": "torch", "torch_profiler_dir": str(folder / "traces"), "torch_profiler_with_stack": False,
        "ignore_frontend": True, "delay_iterations": 8, "max_iterations": 1,
    }  # fmt: skip
    limits = {"features": 8, "max_programs": 8}
    config = plugin_config(profiles=str(folder / "profiles"), limits=limits)
    started = VllmServer(Setup(config, ("--profiler-config", json.dumps(profiler))), folder)
    yield started
    started.stop()


def options(folder: Path, url: str, **changes: object) -> Options:
    fields: dict[str, object] = {
        "command": "sae-steer bench serve", "folder": folder, "url": url, "admin_key": ADMIN_KEY, "concurrency": 2,
        "requests": 4, "prompt_tokens": 8, "output_tokens": 12, "minutes": 0, "cases": ("half",),
    }  # fmt: skip
    return Options(**(fields | changes))


def silent() -> Watch:
    def nothing(*_: object) -> None:
        return None

    return Watch(nothing, nothing, nothing, nothing)


def test_vllms_own_generator_measures_programs_that_differ(server: VllmServer, tmp_path: Path) -> None:
    stored = httpx.get(f"{server.url}/v1/steering/profiles", timeout=30).json()
    run = Run(options(tmp_path, server.url, profile=True), silent())
    run.measure(resume=False)
    assert run.plan is not None
    assert run.plan.generator == "vllm"
    assert run.plan.server.host == "vllm"
    assert {(each.round, each.case) for each in run.done} == {
        (n, case) for n in range(1, 6) for case in ("idle", "half")
    }
    for each in run.done:
        assert (each.requests, each.output_tokens) == (4, 48)
        assert set(each.metrics) >= {"ttft_ms", "tpot_ms", "itl_p99_ms", "e2e_ms"}
    # What was stored for the while is gone.
    assert httpx.get(f"{server.url}/v1/steering/profiles", timeout=30).json() == stored
    (trace,) = Path(json.loads(server_argument(server, "--profiler-config"))["torch_profiler_dir"]).glob("*.json.gz")
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    for name in ("sae_steer::begin_step", "sae_steer::edit_site", "sae_steer::feature_edit", "sae_steer::end_step"):
        assert name in names, name


def server_argument(server: VllmServer, option: str) -> str:
    """What an option was given."""
    words = list(server.process.args)
    return str(words[words.index(option) + 1])


def test_the_openai_client_measures_it_too(server: VllmServer, tmp_path: Path) -> None:
    wanted = {"generator": "openai", "cases": ("programs_8", "prompt"), "concurrency": 8, "requests": 8}
    run = Run(options(tmp_path, server.url, **wanted), silent())
    run.measure(resume=False)
    assert {each.case for each in run.done} == {"idle", "programs_8", "prompt"}
    assert not (tmp_path / "result.json").exists()  # the command writes it
    assert load(tmp_path).rounds == 5


def test_a_launched_server_needs_no_folder_for_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(Setup(None), tmp_path).items():
        monkeypatch.setenv(name, value)
    with Port(None) as port:
        command = serve_command(Setup(plugin_config(limits={"features": 8, "max_programs": 8})), port.number)
    launch = {"url": None, "launch": shlex.join(command), "admin_key": None}
    said: list[str] = []
    wanted = replace(options(tmp_path / "run", "unused"), **launch)
    run = Run(wanted, replace(silent(), say=said.append))
    run.measure(resume=False)
    assert run.plan is not None
    assert run.plan.generator == "openai"
    assert {each.case for each in run.done} == {"plain", "idle", "half"}
    (line,) = [line for line in said if "openai" in line]
    assert "no folder of its own for profiles" in line


def test_without_an_admin_key_they_are_refused_by_name(server: VllmServer, tmp_path: Path) -> None:
    run = Run(options(tmp_path, server.url, admin_key=None, cases=("half", "one"), tokenizer="/no/such"), silent())
    with pytest.raises(LoadFailed, match="vllm bench serve failed"):
        run.measure(resume=False)
    sender = VllmLoad(str(embedded.MODEL), None, None, 60)
    address = Address(server.url, "demo")
    assert sender.obstacle(address, [{"interventions": []}]) is None
    assert "--admin-key" in str(sender.obstacle(address, [None, {"interventions": []}]))
