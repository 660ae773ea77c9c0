"""These files need a GPU and Triton: they are skipped, with the reason, where either is missing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sae_steer_kernels._op import triton_obstacle


def _obstacle() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set: kernels would be interpreted"
    return triton_obstacle()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if obstacle := _obstacle():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=obstacle))


@pytest.fixture
def gpu() -> torch.device:
    """The device under test."""
    return torch.device("cuda")


@contextmanager
def _without_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_sync() -> object:
    """A context in which a synchronisation with the device is an error."""
    return _without_synchronisation
