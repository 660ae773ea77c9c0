"""Partial statistics in a folder, so that a run that is killed goes on where it was.

``manifest.json`` says what is being calibrated. Each shard holds the statistics of some consecutive windows of texts
and where these begin and end in the file; it appears whole or not at all, and what was not yet in a shard is run again.
One process at a time works in the folder: it holds ``.lock``.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sae_steer.errors import DataError
from sae_steer.whole_files import write_whole

MANIFEST = "manifest.json"
_LOCK = ".lock"


class Shards:
    """The folder of one run; no other process can use it until the ``with`` block ends.

    Args:
        folder: The folder; made where it is not there.
        settings: Everything that decides what the statistics are.
        restart: Whether what an earlier run left is removed first, whatever its settings.

    Raises:
        DataError: The folder is of a run with other settings, is not of a run, or another process works in it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        manifest = folder / MANIFEST
        if folder.is_dir() and not manifest.is_file() and not all(map(_passing, folder.iterdir())):
            raise DataError(f"{folder} is not empty and holds no calibration that was begun. Name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise DataError(f"Another process works in {folder}. Wait for it, or choose another --out.") from None
        try:
            self._begin(manifest, json.dumps(settings, sort_keys=True, indent=1), restart=restart)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._lock.release()

    def _begin(self, manifest: Path, settings: str, *, restart: bool) -> None:
        if restart:
            self._clear()
        if manifest.is_file():
            self._compare(manifest, json.loads(settings))
        else:
            write_whole(manifest, settings.encode())

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
        """Adds a shard; raises :class:`DataError` where it cannot be written."""
        path = self.folder / f"shard-{len(self._paths()):06d}.safetensors"
        try:
            write_whole(path, save(tensors, metadata=dict(about)))
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or type(error).__name__}.") from error

    def remove(self) -> None:
        """Removes the run."""
        self._clear()
        # While it is held: who waits for the name then finds a file without one, and opens another.
        (self.folder / _LOCK).unlink(missing_ok=True)
        self.folder.rmdir()

    def _clear(self) -> None:
        """Removes what there is of a run: the manifest last, so that what is left of it is still known as a run."""
        for path in [*self.folder.glob("*.tmp"), *reversed(self._paths()), self.folder / MANIFEST]:
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("shard-??????.safetensors"))


def _passing(path: Path) -> bool:
    """Whether a file may be there before a run has begun."""
    return path.suffix == ".tmp" or path.name == _LOCK
