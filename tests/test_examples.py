"""The examples run as they stand, and the README's curl lines do what they say."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_steer import embedded
from sae_steer_server.settings import Settings
from tests.server.conftest import Served

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """The embedded model, served."""
    served = Served(Settings(model="demo", device="cpu", port=0))
    yield served
    served.stop()


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_process() -> None:
    out = run(EXAMPLES / "in_process.py")
    answers = re.split(r"^--- .*$", out, flags=re.MULTILINE)[1:]
    assert len(answers) == 3
    assert len({answer.split("    feature")[0].strip() for answer in answers}) == 3


def test_openai_client(demo: Served) -> None:
    out = run(EXAMPLES / "openai_client.py", "--base-url", f"{demo.url}/v1")
    sea, music = re.split(r"^--- .*$", out, flags=re.MULTILINE)[1:]
    assert re.search("sea|ocean|tide|boat|lighthouse", sea)
    assert re.search("music|song|piano|violin|concert", music)


def test_demo() -> None:
    out = run(EXAMPLES / "demo.py")
    assert "serving the embedded model at http://127.0.0.1:" in out
    assert "plain" in out
    assert "clamped" in out
    assert "ablated" in out
    assert re.search(r"\(feature \d+\)\s+[\d.]+\s+[\d.]+ -> [\d.]+", out)


def curl_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(curl .*?)\n```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    return blocks


@pytest.mark.parametrize("command", curl_commands())
def test_the_readmes_curl_lines(demo: Served, command: str) -> None:
    command = command.replace("127.0.0.1:8000", demo.url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    reply = json.loads(done.stdout)
    assert "error" not in reply, reply
    if "readings" in command:
        block = reply["choices"][0]["steering"]
        assert any(summary["fired"] for summary in block["readings"][0]["summary"])
        assert len(block["readings"][0]["text"]) == len(block["readings"][0]["top"]) > 0
        assert block["triggers"][0]["feature"] == 551
    elif "choices" in reply:
        assert reply["choices"][0]["steering"]["applied"]["tokens"] > 0
    else:
        assert reply["data"][0]["reference_max"] > 0


def test_the_readme_is_rendered_from_the_results() -> None:
    run(ROOT / "benchmarks" / "render.py", "--check")


def test_the_embedded_model_fits_its_limits() -> None:
    size = sum(path.stat().st_size for path in embedded.FOLDER.rglob("*") if path.is_file())
    assert size <= 12 * 2**20


def test_every_profile_names_the_embedded_dictionary(demo: Served) -> None:
    names = demo.state.steering.catalog.profile_names()
    assert len(names) >= 3
    for name in names:
        profile = demo.state.steering.catalog.profile(name)
        assert profile.saes == {embedded.SAE_NAME: demo.state.steering.catalog.saes[embedded.SAE_NAME].sae.fingerprint}
