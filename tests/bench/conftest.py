"""A small real server to measure, and results to render."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sae_steer_bench.options import Options, Watch
from sae_steer_server.settings import Settings
from tests.server.conftest import Served, base_settings, model_folder, sae_folder, vector_file

__all__ = ["base_settings", "model_folder", "sae_folder", "vector_file"]

ADMIN_KEY = "admin sesame"
TINY = ("--concurrency", "2", "--requests", "2", "--prompt-tokens", "4", "--output-tokens", "4", "--minutes", "0")
"""A run as short as there can be one: five rounds of two requests."""


@pytest.fixture(scope="module")
def served(base_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two ordinary slots of eight features and one wide slot of sixteen, which can be profiled."""
    traces = tmp_path_factory.mktemp("traces")
    server = Served(replace(base_settings, admin_key=ADMIN_KEY, profile_dir=traces))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def bare(base_settings: Settings) -> Iterator[Served]:
    """The same server with nothing attached."""
    server = Served(replace(base_settings, saes=(), vectors=()))
    yield server
    server.stop()


def options(folder: Path, **changes: object) -> Options:
    """Options of a run as short as there can be one."""
    base = Options(
        command="sae-steer bench serve",
        folder=folder,
        concurrency=2,
        requests=2,
        prompt_tokens=4,
        output_tokens=4,
        minutes=0,
    )
    return replace(base, **changes)


def silent(**changes: object) -> Watch:
    """A watch that says nothing, but for what is given."""

    def nothing(*_: object) -> None:
        return None

    return replace(Watch(nothing, nothing, nothing, nothing), **changes)
