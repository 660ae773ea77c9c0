"""The command line: what it teaches, and what it says where a host's dependencies are not installed."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sae_steer.schema import steering_json_schema
from sae_steer_cli.cli import app

# Wide, so that the help is not broken up; plain, so that words can be found in it.
PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
SERVER_EXTRA = ("fastapi", "prometheus_client", "psutil", "starlette", "structlog", "uvicorn")


def test_help_teaches() -> None:
    found = CliRunner().invoke(app, ["serve", "--help"], env=PLAIN).stdout
    for word in (
        "sae-steer serve demo --port 0",
        "--sae",
        "NAME=LOCATION",
        "resid_post.12",
        "SAE_STEER_API_KEY",
        "curl",
    ):
        assert word in found


def test_schema_is_printed() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert json.loads(result.stdout) == steering_json_schema()


def run_without(absent: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where some packages cannot be imported."""
    program = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import sae_steer_cli.__main__ as m; m.main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=PLAIN)


def test_help_needs_no_host() -> None:
    result = run_without((*SERVER_EXTRA, "transformers", "torch"), "--help")
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout
    assert "schema" in result.stdout


@pytest.mark.parametrize("absent", [SERVER_EXTRA, ("uvicorn",)], ids=["all", "one"])
def test_serve_says_what_to_install(absent: tuple[str, ...]) -> None:
    result = run_without(absent, "serve", "demo", "--port", "0")
    assert result.returncode == 2
    assert result.stdout == ""
    said = result.stderr.splitlines()[-1]
    assert said.startswith("sae-steer: ")
    assert "pip install 'sae-steer[server]'" in said


def test_the_command_says_what_to_install() -> None:
    result = run_without(("typer",), "--help")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "sae-steer: typer is not installed. The command needs: pip install 'sae-steer[server]'"
    ]
