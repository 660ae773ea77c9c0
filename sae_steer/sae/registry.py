"""The seam for checkpoint families: a family says which folders are its own, and opens them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_steer.errors import UnsupportedCheckpoint
from sae_steer.sae.pickles import PICKLE_SUFFIXES, refuse_pickle
from sae_steer.sae.record import Sae


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of checkpoint.

    Args:
        name: Its name, unique.
        looks_for: The files by which it is recognised, in words.
        recognises: Whether a folder is of this family; looks at names, never loads.
        open: Opens such a folder; raises :class:`~sae_steer.errors.CheckpointError`.
    """

    name: str
    looks_for: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path], Sae]


class Registry:
    """The known families."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def add(self, family: Family) -> None:
        """Adds a family; raises :class:`ValueError` where its name is taken."""
        if family.name in self._families:
            raise ValueError(f"the checkpoint family {family.name!r} is registered already")
        self._families[family.name] = family

    def named(self, name: str) -> Family:
        """The family of that name; raises :class:`UnsupportedCheckpoint` with those there are."""
        if name not in self._families:
            known = ", ".join(sorted(self._families))
            raise UnsupportedCheckpoint(f"There is no checkpoint family {name!r}. Families: {known}.")
        return self._families[name]

    def sniff(self, folder: Path) -> Family:
        """The one family that recognises a folder.

        Raises:
            UnsafeCheckpoint: None does, and the folder holds pickles.
            UnsupportedCheckpoint: None does, or several do.
        """
        found = self._recognising(folder)
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(family.name for family in found)
            raise UnsupportedCheckpoint(f"{folder} could be of the families {names}. Say which one it is.")
        entries = sorted(folder.iterdir())
        inside = [entry.name for entry in entries if entry.is_dir() and self._recognising(entry)]
        if inside:
            raise UnsupportedCheckpoint(f"{folder} is no SAE, but holds some. Name one: {', '.join(inside[:5])}.")
        for entry in entries:
            if entry.suffix.lower() in PICKLE_SUFFIXES and entry.is_file():
                refuse_pickle(entry)
        looked = "; ".join(f"{family.name}: {family.looks_for}" for family in self._families.values())
        raise UnsupportedCheckpoint(f"{folder} holds no SAE that is known here. Looked for {looked}.")

    def _recognising(self, folder: Path) -> list[Family]:
        return [family for family in self._families.values() if family.recognises(folder)]
