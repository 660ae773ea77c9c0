"""What was measured, line by line on disk, so that a run that was stopped at any moment goes on where it was."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_steer.errors import DataError

_SETTINGS = "settings"


class Journal:
    """An append-only file of JSON lines; the first says what run it belongs to.

    Args:
        path: The file.
        settings: Digest of everything that the measurements depend on.

    Raises:
        DataError: The file is of another run, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            if not lines:
                self._append({_SETTINGS: settings})
                lines = [{_SETTINGS: settings}]
        except OSError as error:
            raise DataError(f"{path} cannot be used: {error.strerror or type(error).__name__}.") from error
        if lines[0].get(_SETTINGS) != settings:
            raise DataError(f"{path} belongs to a run with other settings. Remove it, or name another folder.")
        self._lines = lines[1:]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._lines)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line; it is on disk when this returns."""
        self._append(entry)
        self._lines.append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; what a kill left of the last one is cut off."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    good = 0
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            found.append(value)
            good += len(line)
    if good < path.stat().st_size:
        os.truncate(path, good)
    return found
