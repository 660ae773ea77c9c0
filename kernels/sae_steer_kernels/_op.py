"""What an op is here: a definition, implementations, the choice among them, and how exact each must be."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

NAMESPACE = "sae_steer"

Supports = Callable[..., str]


@dataclass(frozen=True, slots=True)
class Op:
    """An op, its literal definition and its implementations.

    Args:
        name: Name of the op; ``SAE_STEER_<NAME>`` overrides the choice of implementation.
        reference: The definition, in float64.
        implementations: By provider name ("torch", "numba", "triton").
        by_device: Default provider for each device type.
        tolerances: Largest relative error against ``reference`` for each dtype of the written tensor.
        supports: For each provider that cannot take every call: a function of the call's arguments that says why it
            cannot take this one; "" = it can.
        generate: A random, well-formed call from a seed and a device, as keyword arguments of the op: what tests and
            benchmarks start from.
        host_free: Providers whose launches do not depend on data that the host reads, so that a graph may hold them.
    """

    name: str
    reference: Callable[..., Any]
    implementations: Mapping[str, Callable[..., None]]
    by_device: Mapping[str, str]
    tolerances: Mapping[torch.dtype, float]
    supports: Mapping[str, Supports] = field(default_factory=dict)
    generate: Callable[[int, torch.device], dict[str, Any]] | None = None
    host_free: frozenset[str] = frozenset()
    variable: str = field(init=False)
    """Environment variable that names the provider to use."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "variable", f"SAE_STEER_{self.name.upper()}")

    @property
    def overload(self) -> torch._ops.OpOverload[..., Any]:
        """The op as torch knows it, with its schema and its fake implementation."""
        overload: torch._ops.OpOverload[..., Any] = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    @property
    def schema(self) -> str:
        """The op's schema in torch's notation; what it mutates is marked there."""
        return str(self.overload._schema)

    def provider(self, device: torch.device, *arguments: object) -> str:
        """Name of the implementation that a call on a device takes.

        Without an override, a call that the device's provider cannot take falls to "torch", which takes every call.

        Raises:
            LookupError: The override, or the device, names no implementation of this op, or the one that the override
                names cannot take the call.
        """
        # Asked first, since ``get`` finds out by an exception, which each site of each step would pay.
        override = os.environ[self.variable] if self.variable in os.environ else ""  # noqa: SIM401
        provider = override or self.by_device.get(device.type)
        if provider is None or provider not in self.implementations:
            have = ", ".join(self.implementations)
            raise LookupError(
                f"{self.name} has no implementation {provider!r} for {device.type}; {self.variable} takes: {have}."
            )
        supports = self.supports.get(provider)
        obstacle = supports(*arguments) if supports is not None and arguments else ""
        if not obstacle:
            return provider
        if override or "torch" not in self.implementations:
            raise LookupError(f"{self.name} cannot run as {provider!r} here: {obstacle}.")
        return "torch"

    def implementation(self, device: torch.device, *arguments: object) -> Callable[..., None]:
        """The implementation that a call on a device takes; raises as :meth:`provider`."""
        return self.implementations[self.provider(device, *arguments)]


def torch_op(function: Callable[..., None], *, name: str, mutates: Iterable[str]) -> CustomOpDef:
    """Registers an op with torch under our namespace.

    Its schema follows from the annotations of ``function``. The fake implementation does nothing: every op here writes
    into buffers that the caller owns, and returns nothing.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=tuple(mutates))

    def fake(*arguments: object, **keywords: object) -> None:
        return None

    op.register_fake(fake)
    return op


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at the first call: a machine without Triton never imports it."""

    @functools.cache
    def target() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def call(*arguments: Any, **keywords: Any) -> Any:
        return target()(*arguments, **keywords)

    return call


@functools.cache
def triton_obstacle() -> str:
    """Why Triton cannot be used here; "" = it can."""
    return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"
