"""Partial statistics in a folder, so that a run that is killed goes on where it was.

``manifest.json`` says what is being calibrated. Each shard holds the statistics of some consecutive windows of texts
and where the file goes on behind them; it appears whole or not at all, and what was not yet in a shard is run again.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sae_steer.errors import DataError

MANIFEST = "manifest.json"


class Shards:
    """The folder of one run.

    Args:
        folder: The folder; made where it is not there.
        settings: Everything that decides what the statistics are.

    Raises:
        DataError: The folder is of a run with other settings, or is not of a run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(settings, sort_keys=True, indent=1)
        manifest = folder / MANIFEST
        if manifest.is_file():
            self._compare(manifest, json.loads(text))
        elif folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise DataError(f"{folder} is not empty and holds no calibration that was begun. Name another folder.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(manifest, text.encode())

    def _compare(self, manifest: Path, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{manifest} cannot be read: {error}. Begin anew with --restart.") from error
        changed = [key for key in {*before, *settings} if before.get(key) != settings.get(key)]
        if changed:
            raise DataError(
                f"{self.folder} holds a calibration that was begun with other settings ({', '.join(sorted(changed))}). "
                "Repeat the command as it was, or begin anew with --restart."
            )

    def read(self) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
        """The shards in order: tensors, and what :meth:`append` was told of the file."""
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    yield {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is damaged: {error}. Begin anew with --restart.") from error

    def append(self, tensors: dict[str, Tensor], about: Mapping[str, str]) -> None:
        """Adds a shard."""
        path = self.folder / f"shard-{len(self._paths()):06d}.safetensors"
        write_whole(path, save(tensors, metadata=dict(about)))

    def remove(self) -> None:
        """Removes the run."""
        self.discard(self.folder)

    @staticmethod
    def discard(folder: Path) -> None:
        """Removes the run in a folder: the manifest last, so that what is left of it is still known as a run."""
        for path in [*folder.glob("*.tmp"), *reversed(_shards(folder)), folder / MANIFEST]:
            path.unlink(missing_ok=True)
        folder.rmdir()

    def _paths(self) -> list[Path]:
        return _shards(self.folder)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-??????.safetensors"))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also where the machine stops."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
