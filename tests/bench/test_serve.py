"""Runs against real servers: whole, broken off, resumed, refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from typer.testing import CliRunner

from sae_steer_bench.errors import BenchError, LoadFailed
from sae_steer_bench.journal import NAME, read
from sae_steer_bench.load import Address, Work
from sae_steer_bench.load_openai import OpenAILoad
from sae_steer_bench.machine import machine, versions
from sae_steer_bench.records import LoadPlan, Measurement
from sae_steer_bench.report import load
from sae_steer_bench.run import Run
from sae_steer_bench.samples import Batch
from sae_steer_cli.cli import app
from sae_steer_http.client import Unreachable
from sae_steer_server.settings import Settings
from sae_steer_server.sockets import bind, url_of
from tests.bench import results
from tests.bench.conftest import ADMIN_KEY, TINY, options, silent
from tests.cli.test_cli import run_without
from tests.server.conftest import Served

PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}


def bench(*words: str) -> Any:
    """Runs the command in this process."""
    return CliRunner().invoke(app, ["bench", *words], env=PLAIN)


def test_a_whole_run_of_a_running_server(served: Served, bare: Served, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = bench("serve", "--url", served.url, "--plain-url", bare.url, "--rate", "0", *TINY, "--out", str(out))
    assert done.exit_code == 0, done.output
    result = load(out)
    assert result.rounds == 5
    by_key = {case.key: case for case in result.cases}
    for case in result.cases:
        assert set(case.loads) == ({load.name for load in result.plan.loads} if case.status == "measured" else set())
    measured = [key for key, case in by_key.items() if case.status == "measured"]
    steered = ["one", "half", "features_1", "layers_1", "prompt", "completion"]
    assert measured == ["plain", "idle", *steered, "readings_named"]
    # What this small server cannot do, in its own words.
    assert by_key["features_64"].status == "refused"
    assert "HTTP 400" in str(by_key["features_64"].reason)
    assert "(max_programs)" in str(by_key["programs_8"].reason)
    closed, fixed = result.plan.loads
    assert (closed.name, fixed.name) == ("closed", "half rate")
    assert closed.rate is None
    assert fixed.rate is not None
    assert fixed.rate > 0
    for each in result.measurements:
        assert each.requests == 2
        assert each.output_tokens == 8  # none ends earlier
        assert each.metrics.keys() >= {"ttft_ms", "e2e_ms", "output_tokens_per_s"}
        assert each.metrics["e2e_ms"] >= each.metrics["ttft_ms"] > 0
    orders = {tuple(each.case for each in result.measurements if each.round == n) for n in range(1, 6)}
    assert len(orders) > 1
    assert (out / "report.html").stat().st_size > 10_000
    assert "one program for all" in done.stdout
    same = bench("compare", str(out), str(out))
    assert (same.exit_code, same.stderr) == (0, "")


def test_requests_are_steered_as_the_case_says(served: Served, tmp_path: Path) -> None:
    before = served.state.metrics.render().decode()
    run = Run(options(tmp_path, url=served.url, cases=("one",), rounds=5), silent())
    run.measure(resume=False)
    after = served.state.metrics.render().decode()

    def count(text: str) -> float:
        lines = [line for line in text.splitlines() if "edits" in line and not line.startswith("#")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if "_created" not in line)

    # Eight features in each of 4 prompt tokens and 3 fed-back ones, of two requests, in warm-up and five rounds.
    assert count(after) - count(before) >= 8 * 7 * 2 * 6


def test_killed_and_resumed(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["serve", "--url", served.url, *TINY, "--output-tokens", "12", "--case", "one", "--rounds", "9"]
    words[words.index("--minutes") + 1] = "5"
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_steer_cli", "bench", *words, "--out", str(out)],
        stderr=subprocess.DEVNULL, env=os.environ | PLAIN,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (out / NAME).exists() or (out / NAME).read_bytes().count(b'"kind":"round"') < 2:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    plan, done, rounds = read(out)
    assert 2 <= len(rounds) < 9
    again = bench("serve", "--resume", str(out))
    assert again.exit_code == 0, again.output
    result = load(out)
    assert result.plan == plan
    assert result.measurements[: len(done)] == done
    assert sorted((each.round, each.case) for each in result.measurements) == [
        (number, case) for number in range(1, 10) for case in ("idle", "one")
    ]


def test_a_server_that_dies_leaves_its_rounds(base_settings: Settings, tmp_path: Path) -> None:
    dying = Served(replace(base_settings, shutdown_grace=0.0))

    def after_two(measurements: list[Measurement]) -> None:
        if measurements[-1].round == 2:
            dying.stop()

    run = Run(options(tmp_path, url=dying.url, cases=("one",)), silent(rounds=after_two))
    with pytest.raises(LoadFailed, match="under load"):
        run.measure(resume=False)
    assert {each.round for each in run.done} == {1, 2}
    done = bench("report", str(tmp_path))
    assert done.exit_code == 0, done.output
    result = load(tmp_path)
    assert result.rounds == 2
    assert result.stopped
    resumed = bench("serve", "--resume", str(tmp_path), "--timeout", "5")
    assert resumed.exit_code == 2
    assert "cannot be reached" in resumed.stderr
    assert read(tmp_path)[2] == [1, 2]


def test_another_server_is_not_resumed_on(served: Served, tmp_path: Path) -> None:
    run = Run(options(tmp_path, url=served.url, cases=("one",), rounds=5), silent())
    run.measure(resume=False)
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    plan = json.loads(lines[0])
    plan["server"]["saes"][0]["fingerprint"] = "sha256:other"
    (tmp_path / NAME).write_text(json.dumps(plan) + "\n" + "".join(lines[1:]))
    with pytest.raises(BenchError, match="begun on another server: its saes"):
        Run(options(tmp_path), silent()).measure(resume=True)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("versions", "torch", "0.1"),
        ("versions", "sae-steer", None),
        ("versions", "numba-of-then", "1"),
        ("machine", "cores", 4096),
        ("machine", "gpus", ["one that is gone"]),
    ],
)
def test_another_place_is_not_resumed_on(
    served: Served, tmp_path: Path, part: str, name: str, value: str | int | list[str] | None
) -> None:
    plan = results.plan(url=served.url, machine=machine(), versions=versions()).model_dump()
    if value is None:
        del plan[part][name]
    else:
        plan[part][name] = value
    (tmp_path / NAME).write_text(json.dumps(plan) + "\n")
    with pytest.raises(BenchError) as error:
        Run(options(tmp_path), silent()).measure(resume=True)
    assert error.value.message.startswith(f"The run was begun with another {name} ({part}): it was {value}, and is ")


def test_a_trace_names_the_plugins_ops(served: Served, tmp_path: Path) -> None:
    watch: list[str] = []
    run = Run(
        options(tmp_path, url=served.url, cases=("one",), rounds=5, profile=True, admin_key=ADMIN_KEY),
        silent(say=watch.append),
    )
    run.measure(resume=False)
    assert "a trace of one step" in watch[-1]
    folder = served.state.settings.profile_dir
    assert folder is not None
    (trace,) = folder.iterdir()
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    for name in ("sae_steer::begin_step", "sae_steer::feature_edit", "sae_steer::end_step", "aten::linear"):
        assert name in names, name
    assert names.count("sae_steer::begin_step") == 1


def test_a_trace_takes_the_admin_key(served: Served, tmp_path: Path) -> None:
    with served.http() as client:
        assert client.post("/start_profile").status_code == 401
        assert client.post("/stop_profile", headers={"X-Steering-Admin-Key": "wrong"}).status_code == 401
    run = Run(options(tmp_path, url=served.url, cases=("one",), rounds=5, profile=True), silent())
    with pytest.raises(LoadFailed, match="HTTP 401"):
        run.measure(resume=False)


@contextmanager
def running(application: FastAPI) -> Iterator[str]:
    """A server on a free port; yields its address."""
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    yield url_of(sock)
    server.should_exit = True
    thread.join()
    sock.close()


@pytest.fixture(scope="module")
def unsteered() -> Iterator[str]:
    """An OpenAI-compatible server without sae-steer, as far as it is asked."""
    other = FastAPI()
    other.add_api_route("/v1/models", lambda: {"object": "list", "data": [{"id": "m"}]})
    with running(other) as url:
        yield url


def test_a_server_without_the_plugin(unsteered: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="there is no sae-steer to measure"):
        Run(options(tmp_path, url=unsteered), silent()).measure(resume=False)
    assert not (tmp_path / NAME).exists()


def test_a_first_load_that_fails_is_one_line(served: Served, tmp_path: Path) -> None:
    front = FastAPI()

    @front.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(path: str, request: Request) -> Response:
        """All of the server behind it, but for streams."""
        body = await request.body()
        if b'"stream":true' in body.replace(b" ", b""):
            return Response('{"error": {"message": "no stream here"}}', 500, media_type="application/json")
        async with httpx.AsyncClient(base_url=served.url) as client:
            reply = await client.request(
                request.method,
                f"/{path}",
                content=body,
                params=request.query_params,
                headers={"content-type": "application/json"},
            )
        return Response(reply.content, reply.status_code, media_type="application/json")

    with running(front) as url:
        done = bench("serve", "--url", url, *TINY, "--case", "one", "--out", str(tmp_path / "run"))
    assert done.exit_code == 2, done.output
    assert done.stderr == f"sae-steer: {url} answered under load with HTTP 500: no stream here\n"


def test_a_file_in_the_way_is_one_line(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = bench("serve", "--url", served.url, *TINY, "--out", str(file))
    assert done.exit_code == 2, done.output
    assert done.stderr == f"sae-steer: File exists ({file}).\n"


def test_a_report_takes_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(results.result().model_dump_json())
    done = bench("report", str(file))
    assert done.exit_code == 2, done.output
    assert done.stderr == f"sae-steer: {file} is a file: a report is written into the folder of a run. Name that.\n"
    (tmp_path / "plots").write_text("in the way")
    done = bench("report", str(tmp_path))
    assert done.exit_code == 2, done.output
    assert done.stderr == f"sae-steer: The report cannot be written: File exists ({tmp_path / 'plots'}).\n"


def test_a_server_with_saes_is_not_one_without_the_plugin(served: Served, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="has SAEs, so it is no server without the plugin"):
        Run(options(tmp_path, url=served.url, plain_url=served.url), silent()).measure(resume=False)


def test_answers_of_another_length_are_no_pairs(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = OpenAILoad.run

    def shorter(self: OpenAILoad, address: Address, work: Work, load: LoadPlan) -> Batch:
        """What a server does that ends steered answers earlier."""
        return send(self, address, replace(work, output_tokens=3) if work.bodies[0] else work, load)

    monkeypatch.setattr(OpenAILoad, "run", shorter)
    run = Run(options(tmp_path, url=served.url, cases=("one",)), silent())
    with pytest.raises(LoadFailed, match=r"one program for all.*: 2 of 2 requests .* \[3\] tokens where 4 were asked"):
        run.measure(resume=False)
    assert run.done == []


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="cannot be reached"):
        Run(options(tmp_path, url="http://127.0.0.1:9"), silent()).measure(resume=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, "There is no model 'other'"),
        ({"cases": ("all",)}, "'all' is not a case. Cases: plain, idle"),
        ({"concurrency": 7, "requests": 7}, "takes 6 requests at once"),
        ({"prompt_tokens": 510}, "context is 512"),
        ({"requests": 1}, "--requests 1 would never fill --concurrency 2"),
        ({"cases": ("programs_8",)}, "No steered case can be measured here. .*max_programs"),
        ({"generator": "vllm"}, "Use --generator openai"),
    ],
)
def test_what_does_not_fit_the_server(served: Served, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        Run(options(tmp_path, url=served.url, **changes), silent()).measure(resume=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--url", "http://127.0.0.1:1", "--launch", "vllm serve M"), "give one of them"),
        (("--resume", "x", "--url", "http://127.0.0.1:1"), "--resume goes on with the run"),
        (("--resume", "x", "--minutes", "9", "--rate", "2", "--quick"), "takes no --minutes, --rate, --quick"),
        (("--resume", "x", "--seed", "0"), "takes no --seed"),
        (("--minutes", "inf"), "--minutes: write a number"),
        (("--rate", "inf"), "--rate: write a number"),
        (("--value", "nan"), "--value: write a number"),
        (("--url", "http://me:sesame@127.0.0.1:1"), "--url: an address is written into the report"),
        (("--plain-url", "http://me:sesame@127.0.0.1:1"), "--plain-url: an address is written into the report"),
        (("--resume", "/no/such/folder"), "holds no run"),
        (("--launch", "sleep 5"), "only `vllm serve ...`"),
        (("--url", "localhost:8000"), "is not an address"),
    ],
)
def test_wrong_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = bench("serve", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.startswith("sae-steer: ")


def test_keys_do_not_reach_the_report(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["serve", "--url", served.url, *TINY, "--case", "one", "--admin-key", ADMIN_KEY, "--api-key=sesame"]
    monkeypatch.setattr(sys, "argv", ["sae-steer", "bench", *words])
    done = bench(*words, "--out", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"sesame" not in path.read_bytes()
    assert load(tmp_path / "run").plan.command.endswith("--admin-key ... --api-key=...")


@pytest.mark.parametrize("absent", ["openai", "matplotlib", "jinja2", "scipy"])
def test_the_command_says_what_to_install(absent: str, tmp_path: Path) -> None:
    done = run_without((absent,), "bench", "serve", "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"sae-steer: {absent}")
    assert said.endswith("is not installed. This needs: pip install 'sae-steer[bench]'")
