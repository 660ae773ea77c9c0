"""What an op is here: a definition, implementations, the choice among them, and how exact each must be."""

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Op:
    """An op, its literal definition and its implementations.

    Args:
        name: Name of the op; ``SAE_STEER_<NAME>`` overrides the choice of implementation.
        reference: The definition, in float64.
        implementations: By provider name ("torch", "numba", "triton").
        by_device: Default provider for each device type.
        tolerances: Largest relative error against ``reference`` for each dtype of the written tensor.
    """

    name: str
    reference: Callable[..., Any]
    implementations: Mapping[str, Callable[..., None]]
    by_device: Mapping[str, str]
    tolerances: Mapping[torch.dtype, float]

    @property
    def variable(self) -> str:
        """Environment variable that names the provider to use."""
        return f"SAE_STEER_{self.name.upper()}"

    def implementation(self, device: torch.device) -> Callable[..., None]:
        """The implementation for a device.

        Raises:
            LookupError: The override, or the device, names no implementation of this op.
        """
        provider = os.environ.get(self.variable) or self.by_device.get(device.type)
        if provider is None or provider not in self.implementations:
            have = ", ".join(self.implementations)
            raise LookupError(
                f"{self.name} has no implementation {provider!r} for {device.type}; {self.variable} takes: {have}."
            )
        return self.implementations[provider]


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at the first call."""

    @functools.cache
    def target() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def call(*arguments: Any, **keywords: Any) -> Any:
        return target()(*arguments, **keywords)

    return call
