"""A place on disk as the families look at it: files are opened once, and told apart without reading weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae_steer.errors import CheckpointError
from sae_steer.sae.files import WEIGHTS_SUFFIXES, MappedFile, map_weights, read_json


class Location:
    """A folder, or one weights file with what lies beside it.

    Args:
        path: The folder or the file.
        unpacked: A folder into which compressed archives may be unpacked; None = they are refused.

    Attributes:
        path: As given.
        folder: The folder, or the one that the file is in.
        file: The file; None for a folder.
        problems: Why files that were looked at could not be read.
    """

    def __init__(self, path: Path, unpacked: Path | None = None) -> None:
        self.path = path
        self.file = None if path.is_dir() else path
        self.folder = path if self.file is None else path.parent
        self.problems: list[CheckpointError] = []
        self._unpacked = unpacked
        self._opened: dict[Path, MappedFile] = {}
        self._failed: set[Path] = set()

    def has(self, *names: str) -> bool:
        """Whether all of these files are there; where one weights file was named, no other weights count."""
        return all((self.folder / name).is_file() and not self._hidden(self.folder / name) for name in names)

    def weights(self, *suffixes: str) -> list[Path]:
        """The weights files whose names end in one of ``suffixes``: the one that was named, or all, sorted."""
        files = [self.file] if self.file is not None else sorted(self.folder.iterdir())
        return [file for file in files if file.name.lower().endswith(suffixes) and file.is_file()]

    def only(self, *suffixes: str) -> Path | None:
        """The one weights file with such a suffix; None where there is none, or several."""
        found = self.weights(*suffixes)
        return found[0] if len(found) == 1 else None

    def open(self, path: Path) -> MappedFile:
        """Opens a weights file; raises :class:`CheckpointError`."""
        if path not in self._opened:
            self._opened[path] = map_weights(path, self._unpacked)
        return self._opened[path]

    def peek(self, path: Path | None) -> Mapping[str, object]:
        """What a weights file holds by name; empty where there is none or it cannot be read, which is a problem."""
        if path is None or path in self._failed:
            return {}
        try:
            return self.open(path).values
        except CheckpointError as error:
            self._failed.add(path)
            self.problems.append(error)
            return {}

    def shapes(self, path: Path | None) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in a weights file, by name; as :meth:`peek` otherwise."""
        return {name: tuple(value.shape) for name, value in self.peek(path).items() if isinstance(value, Tensor)}

    def config(self, name: str) -> Mapping[str, object]:
        """A JSON object in the folder, for looking at: empty where it is not there or not readable."""
        try:
            return read_json(self.folder / name) if self.has(name) else {}
        except CheckpointError:
            return {}

    def _hidden(self, path: Path) -> bool:
        return self.file is not None and path.suffix.lower() in WEIGHTS_SUFFIXES and path != self.file
