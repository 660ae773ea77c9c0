"""Servers that a run launches by itself: slow, since each of them loads a model twice."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from sae_steer_bench.launch import Launched, Port
from sae_steer_bench.report import load
from sae_steer_bench.run import Run
from tests.bench.conftest import TINY, options, silent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SLOWED = Path(__file__).with_name("slowed_server.py")


def test_the_demonstration_by_one_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sae_steer_cli", "bench", "serve", *TINY, "--case", "one", "--profile"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = load(out)
    ratios = {case.key: case.loads["closed"]["e2e_ms"].ratios for case in result.cases if case.loads}
    assert ratios.keys() == {"plain", "idle", "one"}
    assert ratios["one"].keys() == {"plain", "idle"}
    (trace,) = (out / "profile").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"sae_steer::begin_step", "sae_steer::feature_edit"} <= names


def test_a_killed_run_leaves_no_server_and_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sae_steer_cli", "bench", "serve", *TINY, "--case", "half", "--out", str(out)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    children: list[psutil.Process] = []
    try:
        end = time.monotonic() + 120
        while not (out / "run.jsonl").exists():
            assert time.monotonic() < end
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert len(children) >= 2
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    assert len(gone) == len(children)
    resume = [*command[:5], "--resume", str(out)]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = load(out)
    assert result.rounds == 5
    assert {(each.round, each.case) for each in result.measurements} == {
        (number, case) for number in range(1, 6) for case in ("plain", "idle", "half")
    }


def test_a_slowed_plugin_is_seen(tmp_path: Path) -> None:
    """The same server with a sleep in its edit: the ratio to idle requests of that server tells."""
    found = {}
    for milliseconds in (0, 30):
        port = Port(None)
        argv = [sys.executable, str(SLOWED), str(milliseconds), "serve", "demo", "--port", str(port.number)]
        with Launched(argv, dict(os.environ), port=port, log=tmp_path / f"{milliseconds}.log", timeout=120) as server:
            folder = tmp_path / str(milliseconds)
            run = Run(options(folder, url=server.url, cases=("one", "half"), output_tokens=16, rounds=5), silent())
            run.measure(resume=False)
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
        found[milliseconds] = load(folder)

    def ratio(milliseconds: int, case: str) -> float:
        cases = {each.key: each for each in found[milliseconds].cases}
        return cases[case].loads["closed"]["tpot_ms"].ratios["idle"].median

    # A step of this model takes some milliseconds: thirty more show in any noise.
    for case in ("one", "half"):
        assert ratio(30, case) > 1.5 * ratio(0, case)
    quiet = {each.key: each for each in found[0].cases}["one"].loads["closed"]["tpot_ms"].ratios["idle"]
    slowed = {each.key: each for each in found[30].cases}["one"].loads["closed"]["tpot_ms"].ratios["idle"]
    assert slowed.low > quiet.median
