"""Starts ``tests/kernels/interp`` in a process whose Triton interprets kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "tests/kernels/interp").glob("test_*.py"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    chosen = request.config.getoption("markexpr")
    command = [sys.executable, "-m", "pytest", "-q", f"tests/kernels/interp/{file}", "-m", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # A plugin's variables of this run are not the other's business.
    environment.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # A file that collected nothing would pass without a sound.
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout
    print(done.stdout.strip().splitlines()[-1])
