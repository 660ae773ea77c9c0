"""Every test starts from the same seeds, offline; the run says what it skipped for want of real models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

os.environ["OMP_NUM_THREADS"] = "1"  # servers under test are processes of their own

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ASSETS_VARIABLE = "SAE_STEER_ASSETS"
SEED = 20240229

# The same examples in every run: a red test must stay red until it is mended.
hypothesis.settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("deterministic")


def _find_assets() -> tuple[Path | None, str]:
    """The folder of real models and dictionaries, or None and the reason."""
    value = os.environ.get(ASSETS_VARIABLE)
    if not value:
        return None, f"{ASSETS_VARIABLE} is not set: it names the folder of real models and dictionaries"
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        return None, f"{ASSETS_VARIABLE} names a folder that is not there"
    return path, ""


def pytest_configure() -> None:
    # The models here are tiny: a second thread costs more in waiting than it computes, and far more on a busy machine.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    path, reason = _find_assets()
    return "assets: found" if path else f"assets: not found ({reason})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the `assets` fixture, and skip what needs assets where there are none."""
    path, reason = _find_assets()
    for item in items:
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.assets)
        if path is None and item.get_closest_marker("assets"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_collectionfinish(items: list[pytest.Item]) -> str:
    needing = sum(1 for item in items if item.get_closest_marker("assets"))
    fate = "they run" if _find_assets()[0] else "they are skipped"
    return f"assets: {needing} of {len(items)} tests need them; {fate}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # library code draws from the global generator
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and dictionaries."""
    path, reason = _find_assets()
    if path is None:
        pytest.skip(reason)
    return path
