"""Typed access to the settings in a checkpoint's configuration file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint


@dataclass(frozen=True, slots=True)
class Settings:
    """One flat mapping; a value of the wrong type raises :class:`CheckpointError`, unknown keys are nobody's concern.

    Args:
        values: The settings.
        path: The file they came from, for messages.
    """

    values: Mapping[str, object]
    path: Path

    def text(self, key: str) -> str | None:
        """A string; None = absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.bad(key, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def count(self, key: str) -> int:
        """A whole number of at least 1, which must be there."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad(key, "a whole number of at least 1")
        return value

    def number(self, key: str) -> float:
        """A finite number, which must be there."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.bad(key, "a finite number")
        return float(value)

    def table(self, key: str) -> Mapping[str, object]:
        """An object; empty where it is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.bad(key, "an object")
        return value or {}

    def bad(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that makes no sense."""
        return CheckpointError(f"{self.path}: {key} is {self.values.get(key)!r}; needed is {wanted}.")

    def refusal(self, key: str, why: str) -> UnsupportedCheckpoint:
        """The error for a value that makes sense, and is not computed exactly here."""
        return UnsupportedCheckpoint(f"{self.path}: {key} is {self.values.get(key)!r}, which is refused: {why}.")
