"""What one step of a :class:`~sae_steer.step.StepMap` reads, from its layout to the readers of its requests."""

from collections.abc import Sequence

import numpy as np
import torch

from sae_steer.read_rows import Floats, ReadAt, Tops, read_rows
from sae_steer.readings import Reader
from sae_steer.readout import Readout
from sae_steer.sites import Site
from sae_steer.step import Placed
from sae_steer.tables import SiteTables


class _RunReads:
    """The tokens of one request that are read in the step."""

    def __init__(self, placed: Placed, reader: Reader) -> None:
        self.placed, self.reader = placed, reader
        wanted = ((placed.bits & placed.run.program.reads) != 0) & (placed.positions > reader.seen)
        self.rows = wanted.nonzero()[0]
        self.bits = placed.bits[self.rows]
        self.activations: dict[ReadAt, Floats] = {}
        self.tops: Tops = {}

    def finish(self) -> None:
        placed, run = self.placed, self.placed.run
        values = read_rows(run.program, len(self.rows), self.activations, self.tops)
        self.reader.take(placed.positions[self.rows], placed.tokens[self.rows], values)
        if run.failure is None:
            run.failure = self.reader.failure


class StepReads:
    """The requests of a step that have anything read in it.

    Args:
        placed: Where the step's requests lie.
    """

    def __init__(self, placed: Sequence[Placed]) -> None:
        found = [_RunReads(p, p.run.reader) for p in placed if p.run.reader is not None]
        self._runs = {id(reads.placed): reads for reads in found if len(reads.rows)}
        self._pending: list[tuple[tuple[Site, str], Readout, list[tuple[_RunReads, np.ndarray]]]] = []

    def readouts(self, tables: SiteTables) -> list[Readout]:
        """What must be read of the whole dictionaries of a site."""
        found: list[Readout] = []
        wanted: dict[str, tuple[int, list[tuple[_RunReads, np.ndarray]]]] = {}
        for reads in self._runs.values():
            for (site, source), (k, mask) in reads.reader.wholes.items():
                here = ((reads.bits & mask) != 0).nonzero()[0]
                if site == tables.site and len(here):
                    most, runs = wanted.get(source, (0, []))
                    wanted[source] = max(most, k), [*runs, (reads, here)]
        for source, (k, runs) in wanted.items():
            whole = tables.whole_of(source)
            rows = np.concatenate([reads.placed.first + reads.rows[here] for reads, here in runs])
            tokens = torch.from_numpy(rows).to(tables.device)
            readout = Readout(whole, min(k, whole.enc.shape[0]), tokens)
            self._pending.append(((tables.site, source), readout, runs))
            found.append(readout)
        return found

    def gather(self, placed: Placed, site: Site, before: np.ndarray, after: np.ndarray) -> None:
        """Keeps what a site reported of a request's tokens, ``[t, K]`` each."""
        reads = self._runs.get(id(placed))
        if reads is not None:
            reads.activations[site, False] = before[reads.rows].astype(np.float64)
            reads.activations[site, True] = after[reads.rows].astype(np.float64)

    def finish(self) -> None:
        """Hands everything over to the requests' readers."""
        for key, readout, runs in self._pending:
            ids, values = readout.found()
            first = 0
            for reads, here in runs:
                own = slice(first, first + len(here))
                shape = len(reads.rows), readout.k
                mine, top = np.full(shape, -1.0), np.zeros(shape)
                mine[here], top[here] = ids[own], values[own]
                reads.tops[key] = mine, top
                first += len(here)
        for reads in self._runs.values():
            for key in reads.reader.wholes:
                reads.tops.setdefault(key, (np.full((len(reads.rows), 1), -1.0), np.zeros((len(reads.rows), 1))))
            reads.finish()
