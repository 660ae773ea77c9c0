"""These files compile kernels for GPUs that are not there: not for a process whose Triton interprets them."""

import os
from pathlib import Path

import pytest

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for Triton's compiled files, new in every run."""
    return tmp_path_factory.mktemp("triton")
