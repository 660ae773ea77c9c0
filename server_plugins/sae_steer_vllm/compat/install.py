"""Puts the wrappers of this package around vLLM's functions."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import vllm
from vllm.forward_context import get_forward_context
from vllm.v1.worker.worker_base import WorkerBase

from sae_steer_vllm import op
from sae_steer_vllm.compat import calibration, frontend, runner, scheduler, versions
from sae_steer_vllm.compat.versions import MINE

WRAPPERS: dict[str, Callable[..., Any]] = {**scheduler.WRAPPERS, **frontend.WRAPPERS, **runner.WRAPPERS}
"""What is wrapped, as the ledger names it, and by what."""

_IMPORTERS = {
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "vllm.v1.core.block_pool",
        "vllm.v1.simple_kv_offload.manager",
    ),
}


def register() -> None:
    """Entry point ``vllm.general_plugins``: wraps what the ledger names, once a process."""
    if getattr(vllm, MINE, False):
        return
    setattr(vllm, MINE, True)
    op.found_by(lambda name: get_forward_context().no_compile_layers[name])
    for where, wrap in WRAPPERS.items():
        _install(where, wrap)
    WorkerBase.sae_steer_describe = runner.describe  # type: ignore[attr-defined]
    WorkerBase.sae_steer_harvest = calibration.harvest  # type: ignore[attr-defined]


def _install(where: str, wrap: Callable[..., Any]) -> None:
    """Puts a wrapper around a function of vLLM, under every name by which vLLM's modules know it."""
    module_name, _, name = where.partition(":")
    owner_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        owner = getattr(module, owner_name) if owner_name else module
        original = getattr(owner, attribute)
    except (ModuleNotFoundError, AttributeError):
        versions.MISSING.append(where)  # not raised: this may be an engine that does not steer
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrap(original, *args, **kwargs)

    setattr(owner, attribute, wrapped)
    for importer in _IMPORTERS.get(where, ()):
        try:
            other = importlib.import_module(importer)
        except ModuleNotFoundError:
            continue  # a version that has no such module
        if getattr(other, attribute, None) is original:
            setattr(other, attribute, wrapped)
