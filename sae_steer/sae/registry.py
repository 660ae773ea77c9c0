"""The seam for checkpoint families: a family says which places are its own, and opens them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from sae_steer.errors import UnsupportedCheckpoint
from sae_steer.sae.files import WEIGHTS_SUFFIXES, FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.pickles import PICKLE_SUFFIXES, refuse_pickle

_NAMED = 5  # SAEs or files that a message lists
_LISTED = 12  # tensors of a file


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of checkpoint.

    Args:
        name: Its name, unique.
        looks_for: The files, and the tensors in them, by which it is recognised, in words.
        recognises: Whether a place is of this family; looks at names and shapes, and never raises.
        open: Opens such a place; raises :class:`~sae_steer.errors.CheckpointError`.
    """

    name: str
    looks_for: str
    recognises: Callable[[Location], bool]
    open: Callable[[Location], FileSae]


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

    def names(self) -> list[str]:
        """The names of all families."""
        return list(self._families)

    def sniff(self, location: Location) -> Family:
        """The one family that recognises a place.

        Raises:
            UnsafeCheckpoint: None does, and there are pickles of more than tensors.
            UnsupportedCheckpoint: None does, or several do.
            CheckpointError: None does, and weights there cannot be read.
        """
        found = self._recognising(location)
        if len(found) == 1:
            return found[0]
        path = location.path
        if found:
            names = " and ".join(family.name for family in found)
            raise UnsupportedCheckpoint(f"{path} could be of the families {names}. Say which one it is.")
        if location.file is None:
            entries = sorted(path.iterdir())
            inside = (entry.name for entry in entries if self._is_one(Location(entry)))
            if several := ", ".join(islice(inside, _NAMED)):
                raise UnsupportedCheckpoint(f"{path} is no SAE, but holds some. Name one: {several}.")
            for entry in entries:
                if entry.suffix.lower() in PICKLE_SUFFIXES - WEIGHTS_SUFFIXES and entry.is_file():
                    refuse_pickle(entry)
        held = [f"{file.name} with {_listed(location.peek(file))}" for file in location.weights(*WEIGHTS_SUFFIXES)]
        if location.problems:
            raise location.problems[0]
        found_there = f" There is {'; '.join(held[:_NAMED])}." if held else ""
        looked = "; ".join(f"{family.name}: {family.looks_for}" for family in self._families.values())
        raise UnsupportedCheckpoint(f"{path} holds no SAE that is known here. Looked for {looked}.{found_there}")

    def _is_one(self, location: Location) -> bool:
        known = location.file is None or location.path.suffix.lower() in WEIGHTS_SUFFIXES
        return known and bool(self._recognising(location))

    def _recognising(self, location: Location) -> list[Family]:
        return [family for family in self._families.values() if family.recognises(location)]


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
