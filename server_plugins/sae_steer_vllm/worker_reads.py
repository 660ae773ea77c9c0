"""What the requests of a batch have read on a worker: planned once, gathered in each step, cut for each request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.device_reads import DeviceReads, Gathers
from sae_steer.edit_layer import EditLayer
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.read_rows import Floats, ReadAt, Tops, layout, needed_rows, read_rows, whole_reads
from sae_steer.readout import Readout, ReadoutSpace
from sae_steer.schema import MAX_TOP_K
from sae_steer.sites import Site
from sae_steer.tables import Whole

_HEAD = 2
"""Columns before those of what was read: position and token id."""


@dataclass(frozen=True, slots=True)
class ReadRun:
    """A request that has anything read.

    Args:
        name: The request.
        number: Its number in the batch.
        program: What it asks.
        bucket: Of its slot.
        prompt_length: ``P``.
    """

    name: str
    number: int
    program: Program
    bucket: int
    prompt_length: int

    @property
    def kind(self) -> tuple[str, int]:
        """Runs of one kind have their numbers in the same places."""
        return self.program.digest, self.bucket


@dataclass(frozen=True, slots=True)
class _Largest:
    """Where the largest features of one dictionary are in a step's matrix, and who asks for them.

    Args:
        first: The first column.
        k: How many are found.
        masks: ``[R]`` int32: on which selectors each request of the batch asks.
    """

    first: int
    k: int
    masks: Tensor


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a request's rows come out of a step's matrix, where each of their columns is one of the matrix's.

    Args:
        columns: ``[2 + W]`` which.
        less: ``[2 + W]`` what is taken off, since numbers of features are one too large there; None = nothing.
    """

    columns: NDArray[np.int64]
    less: Floats | None


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What does not change while the batch holds the same requests.

    Every process of a pipeline makes the same plan, and so the same matrix ``[n, C]``: position and token id from the
    first, and what was read; zero where another process has it.

    Args:
        runs: The requests.
        gathers: Rows that are read.
        places: The same, for each place of one bucket.
        columns: The first column of each of ``gathers``.
        largest: By site and SAE.
        width: ``C``.
        cuts: By program; None = its rows take more than a choice of columns.
    """

    runs: list[ReadRun]
    gathers: Gathers
    places: Mapping[int, Mapping[ReadAt, Sequence[int]]]
    columns: Mapping[tuple[int, int, bool], int]
    largest: Mapping[tuple[Site, str], _Largest]
    width: int
    sites: tuple[Site, ...]
    cuts: Mapping[tuple[str, int], _Cut | None]

    @classmethod
    def make(
        cls,
        runs: list[ReadRun],
        sites: tuple[Site, ...],
        features: Mapping[str, int],
        requests: int,
        device: torch.device,
    ) -> Self | None:
        """The plan of a batch of so many ``requests``; None where nobody reads. ``features`` are ``F`` of each SAE."""
        if not runs:
            return None
        wanted: dict[tuple[int, int, bool], set[int]] = {}
        masks: dict[tuple[Site, str], tuple[int, NDArray[np.int32]]] = {}
        for run in runs:
            for (site, after), own_rows in needed_rows(run.program).items():
                wanted.setdefault((run.bucket, sites.index(site), after), set()).update(own_rows)
            for key, (k, mask) in whole_reads(run.program).items():
                most, own = masks.setdefault(key, (0, np.zeros(requests, np.int32)))
                own[run.number] = mask
                masks[key] = max(most, min(k, features[key[1]])), own
        columns: dict[tuple[int, int, bool], int] = {}
        places: dict[int, dict[ReadAt, list[int]]] = {run.bucket: {} for run in runs}
        width = _HEAD
        for (bucket, number, after), rows in wanted.items():
            places[bucket][sites[number], after] = sorted(rows)
            columns[bucket, number, after], width = width, width + len(rows)
        gathers = {place: torch.tensor(sorted(rows), device=device) for place, rows in wanted.items()}
        largest: dict[tuple[Site, str], _Largest] = {}
        for key, (k, own) in masks.items():
            largest[key], width = _Largest(width, k, torch.from_numpy(own).to(device)), width + 2 * k
        firsts = {(bucket, (sites[number], after)): first for (bucket, number, after), first in columns.items()}
        cuts: dict[tuple[str, int], _Cut | None] = {}
        for run in runs:
            if run.kind not in cuts:
                cuts[run.kind] = _cut(run, places[run.bucket], firsts, largest)
        return cls(runs, gathers, places, columns, largest, width, sites, cuts)


def _cut(
    run: ReadRun,
    places: Mapping[ReadAt, Sequence[int]],
    firsts: Mapping[tuple[int, ReadAt], int],
    largest: Mapping[tuple[Site, str], _Largest],
) -> _Cut | None:
    """The columns of a program's rows, as :func:`~sae_steer.read_rows.read_rows` would fill them."""
    program = run.program
    if any(reading.top_k and reading.after for reading in program.readings):
        return None  # the largest after the edits are found among the largest before them
    columns = list(range(_HEAD))
    numbers: set[int] = set()  # columns of the rows that hold numbers of features

    def named(place: ReadAt, rows: Sequence[int]) -> None:
        columns.extend(firsts[run.bucket, place] + places[place].index(row) for row in rows)

    for reading in program.readings:
        if reading.rows:
            named((reading.site, reading.after), reading.rows)
        if reading.top_k:
            found = largest[reading.site, reading.source]
            numbers.update(range(len(columns), len(columns) + reading.top_k))
            for first in (found.first, found.first + found.k):
                columns.extend(range(first, first + reading.top_k))
    for trigger in program.triggers:
        named((trigger.site, False), [trigger.row])
    less = np.array([float(i in numbers) for i in range(len(columns))]) if numbers else None
    return _Cut(np.array(columns, dtype=np.int64), less)


@dataclass(slots=True)
class StepReads:
    """One step of a plan.

    Args:
        plan: The plan.
        reads: The tokens.
        space: What whole dictionaries are read in; None = none is held whole.
    """

    plan: ReadPlan
    reads: DeviceReads
    space: ReadoutSpace | None
    _asks: dict[tuple[Site, str], Tensor] = field(default_factory=dict)

    def arm(self, layer: EditLayer) -> None:
        """Tells a site what must be read there of its whole dictionaries."""
        found: list[Readout] = []
        for (site, source), largest in self.plan.largest.items():
            if site != layer.site:
                continue
            asks = ((self.reads.bits & largest.masks[self.reads.request]) != 0).nonzero().squeeze(1)
            if len(asks):
                self._asks[site, source] = asks
                keep = partial(self._keep, site, source)
                whole, tokens = layer.tables.whole_of(source), self.reads.tokens[asks]
                found.append(Readout(whole, largest.k, tokens, self.space, keep))
        layer.readouts = tuple(found)

    def _keep(self, site: Site, source: str, ids: Tensor, values: Tensor) -> None:
        store = self.reads.store
        store.keep(("ids", site, source), ids)
        store.keep(("top", site, source), values)

    def matrix(self, before: Tensor | None) -> Tensor:
        """``[n, C]`` float64 on the CPU, of this process and of those ``before`` it in a pipeline."""
        n = len(self.reads.tokens)
        found, kept = np.zeros((n, self.plan.width)), self.reads.store.take()
        if before is None:
            found[:, 0], found[:, 1] = (t.cpu().numpy() for t in (self.reads.positions, self.reads.ids))
        for key, first in self.plan.columns.items():
            if key in kept:
                found[:, first : first + kept[key].shape[1]] = kept[key]
        for place, asks in self._asks.items():
            largest, here = self.plan.largest[place], asks.cpu().numpy()
            first, k = largest.first, largest.k
            # One more than the number, so that a process that does not have the site adds nothing to it.
            found[here, first : first + k] = kept["ids", *place] + 1.0
            found[here, first + k : first + 2 * k] = kept["top", *place]
        made = torch.from_numpy(found)
        return made if before is None else made + before.cpu()

    def split(self, matrix: Tensor) -> tuple[dict[str, Floats], list[str], list[str]]:
        """Every request's rows, ``[m, 2 + W]``: position, token id, and the columns of :func:`layout`.

        Returns:
            These, the requests that a trigger ends, and those that must end because a value is not finite.
        """
        values, request = matrix.numpy(), self.reads.request.cpu().numpy()
        found: dict[str, Floats] = {}
        stops: list[str] = []
        broken: list[str] = []
        finite = bool(np.isfinite(values).all())
        # Where all ask the same, their rows are made at once.
        everybody = self._rows(self.plan.runs[0], values) if len(self.plan.cuts) == 1 else None
        # A request's tokens lie together, in the order of the batch.
        counts = np.bincount(request, minlength=self.plan.runs[-1].number + 1).tolist()
        end = 0
        for run in self.plan.runs:
            first, end = end, end + counts[run.number]
            if first == end:
                continue
            rows = everybody[first:end] if everybody is not None else self._rows(run, values[first:end])
            if not finite and not np.isfinite(rows).all():
                broken.append(run.name)
                continue
            found[run.name] = rows
            if run.program.triggers and _stops(run, rows):
                stops.append(run.name)
        return found, stops, broken

    def _rows(self, run: ReadRun, values: Floats) -> Floats:
        """``[n, 2 + W]`` of some tokens of a run, or of others of its kind."""
        cut = self.plan.cuts[run.kind]
        if cut is None:
            return np.concatenate([values[:, :_HEAD], self._exact_rows(run, values)], axis=1)
        rows = values[:, cut.columns]
        return rows if cut.less is None else rows - cut.less

    def _exact_rows(self, run: ReadRun, values: Floats) -> Floats:
        activations: dict[ReadAt, Floats] = {}
        places = self.plan.places[run.bucket]
        for (site, after), read in places.items():
            first = self.plan.columns[run.bucket, self.plan.sites.index(site), after]
            activations[site, after] = values[:, first : first + len(read)]
        tops: Tops = {}
        for key in whole_reads(run.program):
            largest = self.plan.largest[key]
            first, k = largest.first, largest.k
            tops[key] = values[:, first : first + k] - 1, values[:, first + k : first + 2 * k]
        return read_rows(run.program, len(values), activations, tops, places)


def _stops(run: ReadRun, rows: Floats) -> bool:
    """Whether a trigger ends the request on one of these tokens ``[n, 2 + W]``."""
    program = run.program
    first, positions = _HEAD + layout(program)[1].start, rows[:, 0].astype(np.int64)
    for i, trigger in enumerate(program.triggers):
        held = program.selectors[trigger.selector].by_position(positions, run.prompt_length)
        if trigger.stop and bool((held & (rows[:, first + i] > trigger.above)).any()):
            return True
    return False


def read_runs(requests: Sequence[str], programs: Mapping[str, tuple[Program, int, int]]) -> list[ReadRun]:
    """The requests of a batch that read, from the program, bucket and prompt length of those that are steered."""
    return [
        ReadRun(name, number, *programs[name])
        for number, name in enumerate(requests)
        if name in programs and programs[name][0].reads
    ]


def readout_space(wholes: Sequence[Whole], limits: Limits, device: torch.device) -> ReadoutSpace | None:
    """What all of a worker's whole dictionaries are read in; None where it has none.

    It is there from the start, so that an engine that measures its memory sees it. An edit can take a feature out of
    the largest, so that after the edits of a program as many more may have to be found.
    """
    if not wholes:
        return None
    shapes = [(whole.enc.shape[0], whole.enc.shape[1]) for whole in wholes]
    return ReadoutSpace(shapes, usual_k=MAX_TOP_K, most_k=MAX_TOP_K + limits.widest, device=device)
