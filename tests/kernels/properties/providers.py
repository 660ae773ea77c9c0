"""Runs an op by a named implementation, whatever the device's default is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sae_steer_kernels._op import Op


@contextmanager
def provider(op: Op, name: str) -> Iterator[None]:
    """Inside, ``op`` runs by the implementation ``name``, or not at all."""
    before = os.environ.get(op.variable)
    os.environ[op.variable] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[op.variable]
        else:
            os.environ[op.variable] = before
