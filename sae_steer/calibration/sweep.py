"""Strength by place: what an intervention does to a target, what it costs elsewhere, and where more is not worth it.

The effect is the change of the mean log-probability of the target's tokens, in nats a token; the cost is the rise of
the loss on plain text, in the same unit. Of the strengths at one place the **knee** is the one whose point (cost,
effect), both as shares of their largest value there, lies farthest above the chord from (0, 0) to (1, 1): behind it
cost grows faster than effect. That is the definition of Kneedle (Satopaa and others, 2011) without its smoothing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sae_steer.calibration.scoring import Passage, Score, score, steered
from sae_steer.catalog import Catalog
from sae_steer.errors import DataError
from sae_steer.sites import Site


@dataclass(frozen=True, slots=True)
class Case:
    """An intervention at one place, as a function of its strength.

    Args:
        name: What the results call it, such as ``resid_post.3``.
        catalog: What its request may name.
        sites: Places to hook beside those of the catalog's SAEs.
        features: Most features that its program edits.
        edit: From a strength to the ``interventions`` of a request.
    """

    name: str
    catalog: Catalog
    sites: tuple[Site, ...]
    features: int
    edit: Callable[[float], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one strength at one place did.

    Args:
        place: Name of the case.
        strength: The strength.
        effect: Change of the target's log-probability, nats a token.
        cost: Rise of the loss on plain text, nats a token.
        perplexity: On plain text.
        dose: Mean over plain text's tokens of ``|delta| / |x|``.
        dose_max: Its largest value.
        fired: Pairs of token and feature that were changed on plain text.
    """

    place: str
    strength: float
    effect: float
    cost: float
    perplexity: float
    dose: float
    dose_max: float
    fired: int


@dataclass(frozen=True, slots=True)
class Knee:
    """Where more strength is no longer worth it at one place; ``above`` is the distance above the chord."""

    place: str
    strength: float
    above: float


class Journal:
    """Cells that are done, one a line in a file that only grows, so that a killed sweep goes on.

    Args:
        path: The file.
        settings: Everything that decides what the cells are.

    Raises:
        DataError: The file is of a sweep with other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.cells: dict[tuple[str, float], Cell] = {}
        self.plain: dict[str, Any] | None = None
        if path.exists():
            self._read()
        else:
            self._append({"settings": self.digest})

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # killed while it wrote a line
            os.truncate(self.path, len(whole))
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()] or [{"settings": self.digest}]
            found = first["settings"]
            cells = [Cell(**line["cell"]) for line in rest if "cell" in line]
            plain = [line["plain"] for line in rest if "plain" in line]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is not the journal of a sweep ({error}). Name another --out.") from error
        if found != self.digest:
            raise DataError(f"{self.path} is of a sweep with other settings. Name another --out, or remove it.")
        if not whole:
            self._append({"settings": self.digest})
        self.cells = {(cell.place, cell.strength): cell for cell in cells}
        self.plain = plain[0] if plain else None

    def add(self, cell: Cell) -> None:
        """Writes a cell down."""
        self.cells[cell.place, cell.strength] = cell
        self._append({"cell": asdict(cell)})

    def begin(self, target: Score, plain: Score) -> None:
        """Writes down what the model does unsteered."""
        self.plain = {"target": asdict(target), "plain": asdict(plain)}
        self._append({"plain": self.plain})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def sweep(
    model: nn.Module,
    cases: Sequence[Case],
    strengths: Sequence[float],
    target: Sequence[Passage],
    plain: Sequence[Passage],
    journal: Journal,
    *,
    batch_tokens: int = 4096,
    tick: Callable[[], object] = lambda: None,
) -> tuple[list[Cell], Score, Score]:
    """Every strength at every place: the cells in order, and the unsteered scores of target and plain text.

    Raises:
        RequestError: A request cannot be honoured.
        RunFailed: An edit produced a value that is not finite.
    """
    if journal.plain is None:
        with _attached(model, cases[0]) as steer:
            both = [score(steer, texts, batch_tokens=batch_tokens) for texts in (target, plain)]
        journal.begin(*both)
    assert journal.plain is not None
    before, bare = Score(**journal.plain["target"]), Score(**journal.plain["plain"])
    for case in cases:
        todo = [s for s in strengths if (case.name, s) not in journal.cells]
        for _ in range(len(strengths) - len(todo)):
            tick()
        if not todo:
            continue
        with _attached(model, case) as steer:
            for strength in todo:
                request = {"interventions": case.edit(strength)}
                there = score(steer, target, request, batch_tokens=batch_tokens)
                cost = score(steer, plain, request, batch_tokens=batch_tokens)
                journal.add(
                    Cell(
                        case.name,
                        strength,
                        before.loss - there.loss,
                        cost.loss - bare.loss,
                        cost.perplexity,
                        cost.dose,
                        cost.dose_max,
                        cost.fired,
                    )
                )
                tick()
    return [journal.cells[case.name, s] for case in cases for s in strengths], before, bare


@contextmanager
def _attached(model: nn.Module, case: Case) -> Iterator[Any]:
    with steered(case.catalog, model, case.sites, case.features) as steer:
        yield steer


def knee(cells: Sequence[Cell]) -> Knee | None:
    """The knee of the cells of one place; None where no point is above the chord, or nothing is paid anywhere.

    The effect counts in the direction of its largest value, so that suppression and promotion are judged alike; a cost
    below zero is none. The unsteered model is the chord's first point.
    """
    if not cells:
        return None
    largest = max((cell.effect for cell in cells), key=abs)
    most = max(cell.cost for cell in cells)
    if largest == 0 or most <= 0:
        return None

    def above(cell: Cell) -> float:
        return cell.effect / largest - max(cell.cost, 0.0) / most

    best = max(cells, key=lambda cell: (above(cell), -abs(cell.strength)))
    return Knee(best.place, best.strength, above(best)) if above(best) > 0 else None


def knees(cells: Sequence[Cell]) -> list[Knee]:
    """The knee of each place that has one, in order."""
    places = dict.fromkeys(cell.place for cell in cells)
    found = (knee([cell for cell in cells if cell.place == place]) for place in places)
    return [k for k in found if k is not None]
