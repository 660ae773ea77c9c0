"""The README's line for vLLM starts a server, and the examples for vLLM run as they stand."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sae_steer_bench.launch import Port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BIN = str(Path(sys.executable).parent)
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([BIN, os.environ["PATH"]]),
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
ENVIRONMENT.pop("VLLM_PLUGINS", None)  # the line says it itself


def _line() -> str:
    lines = re.findall(r"^VLLM_PLUGINS=.*vllm serve .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) == 1
    return str(lines[0])


def _answers(url: str, server: "subprocess.Popen[str]") -> bool:
    if server.poll() is not None:
        pytest.fail(f"the README's line ended with {server.returncode}")
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The server of the README's line, to the letter but for the port, which somebody else may have."""
    port = Port(None)
    line = _line()
    assert " --port 8000 " in line
    # `exec` lets the signal below reach the server and not the shell.
    command = line.replace(" --port 8000 ", f" --port {port.number} ").replace("vllm serve", "exec vllm serve", 1)
    server = subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, text=True)
    try:
        address = f"http://127.0.0.1:{port.number}"
        deadline = time.monotonic() + 270
        while not _answers(address, server):
            assert time.monotonic() < deadline, "the server of the README's line does not answer"
            time.sleep(1)
        yield address
    finally:
        port.release()
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def _run(*command: str | Path, seconds: float = 200) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=ENVIRONMENT | {"VLLM_PLUGINS": "sae_steer"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _answers_of(out: str) -> list[str]:
    return [part.strip() for part in re.split(r"^--- .*$", out, flags=re.MULTILINE)[1:]]


@pytest.mark.timeout(400)
def test_the_http_example_on_the_readmes_line(url: str) -> None:
    plain, music, seaside = _answers_of(_run(EXAMPLES / "vllm_http.py", "--base-url", f"{url}/v1"))
    assert re.search("music|song|piano|violin|concert", music)
    assert re.search(r"[1-9]\d* tokens were edited", music)
    assert re.search("sea|ocean|tide|boat|lighthouse|sand", seaside)
    assert len({plain, music, seaside}) == 3


def test_the_selftest_passes_on_the_readmes_line(url: str) -> None:
    out = _run("-m", "sae_steer_cli", "selftest", "--url", url)
    assert "FAIL" not in out
    assert out.count("PASS") >= 5


def test_the_offline_example() -> None:
    plain, music, no_sea = _answers_of(_run(EXAMPLES / "vllm_offline.py"))
    assert re.search("sea|sand|ship|sailor", plain)
    assert re.search("music|song|piano|violin|concert", music)
    assert "feature 551" in no_sea
    assert not re.search(r"\bsea\b", no_sea.split("    feature")[0])
