"""What a request has read: gathered step by step, told token by token, and summed up at the end.

A host hands over, for every token that is read, one row of numbers (:mod:`sae_steer.read_rows`). Which
readings hold on a token follows from its position alone, so that a row needs nothing beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_steer.errors import NonFinite, RunFailed
from sae_steer.program import Program, Reading, Row, Selector
from sae_steer.read_rows import Columns, Floats, layout, whole_reads
from sae_steer.sites import Site

NOT_FINITE = "An activation that was read is not finite. The request was ended; others were not touched."
NameOf = Callable[[Site, str], str]
TextOf = Callable[[int], str]


def values_of(reading: Reading) -> int:
    """How many activations of a token a reading sends back, where it sends every token's."""
    return len(reading.rows) + reading.top_k if reading.per_token else 0


def reading_values(program: Program, prompt_length: int, new_tokens: int) -> int:
    """Activations that an answer of ``new_tokens`` tokens sends back; the last token is never run through the model."""
    tokens = prompt_length + max(new_tokens, 1) - 1
    return sum(
        program.selectors[reading.selector].count(tokens, prompt_length) * values_of(reading)
        for reading in program.readings
    )


def computed_values(program: Program, prompt_length: int, new_tokens: int) -> int:
    """Numbers that a host keeps for an answer of ``new_tokens`` tokens, those of summaries too."""
    tokens = prompt_length + max(new_tokens, 1) - 1
    read = sum(program.selectors[reading.selector].count(tokens, prompt_length) for reading in program.readings)
    return min(tokens, read) * layout(program)[2]


@dataclass(slots=True)
class _Sums:
    """Running sums over the tokens of one reading; one entry for each feature."""

    ids: NDArray[np.int64]
    max: Floats = field(init=False)
    argmax: NDArray[np.int64] = field(init=False)
    total: Floats = field(init=False)
    last: Floats = field(init=False)
    fired: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.ids)
        self.max, self.total, self.last = np.full(n, -np.inf), np.zeros(n), np.zeros(n)
        self.argmax, self.fired = np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.int64)

    def add(self, positions: NDArray[np.int64], values: Floats) -> None:
        """Adds tokens ``[n]`` with their values ``[n, F]``."""
        best = values.argmax(axis=0)  # the first of equals
        largest = values[best, np.arange(len(self.ids))]
        better = largest > self.max
        self.max, self.argmax = np.where(better, largest, self.max), np.where(better, positions[best], self.argmax)
        self.total += values.sum(axis=0)
        self.last = values[-1].copy()  # a view would keep the whole step's rows
        self.fired += (values > 0).sum(axis=0)

    def entries(self, tokens: int) -> list[dict[str, Any]]:
        """One entry for each feature."""
        return [
            {
                "feature": int(self.ids[i]),
                "max": float(self.max[i]) if tokens else 0.0,
                "argmax": int(self.argmax[i]) if tokens else None,
                "mean": float(self.total[i]) / tokens if tokens else 0.0,
                "last": float(self.last[i]),
                "fired": int(self.fired[i]) / tokens if tokens else 0.0,
                "tokens": tokens,
            }
            for i in range(len(self.ids))
        ]


@dataclass(slots=True)
class _Top:
    """Running sums over the features that were among the largest of a token: maximum, where, sum, count, last."""

    found: dict[int, list[float]] = field(default_factory=dict)

    def add(self, positions: NDArray[np.int64], ids: Floats, values: Floats) -> None:
        """Adds tokens ``[n]`` with their largest features ``[n, k]``."""
        places, columns = np.nonzero(ids >= 0)
        if not len(places):
            return
        features, inverse = np.unique(ids[places, columns].astype(np.int64), return_inverse=True)
        found = values[places, columns]
        order = np.lexsort((places, -found, inverse))
        best = order[
            np.unique(inverse[order], return_index=True)[1]
        ]  # of each feature the largest, the first of equals
        counts, totals = np.bincount(inverse), np.bincount(inverse, weights=found)
        ends = np.full(len(features), np.nan)
        at_end = places == len(positions) - 1
        ends[inverse[at_end]] = found[at_end]
        rows = zip(found[best], positions[places[best]], totals, counts, ends, strict=True)
        for feature, (largest, where, total, count, end) in zip(features.tolist(), rows, strict=True):
            sums = self.found.setdefault(feature, [-np.inf, -1, 0.0, 0, 0.0, -1])
            if largest > sums[0]:
                sums[0], sums[1] = float(largest), int(where)
            sums[2] += float(total)
            sums[3] += int(count)
            if not np.isnan(end):
                sums[4], sums[5] = float(end), int(positions[-1])

    def entries(self, tokens: int, k: int, last: int) -> list[dict[str, Any]]:
        """The k features of the largest maxima, the lower number first among equals."""
        best = sorted(self.found.items(), key=lambda item: (-item[1][0], item[0]))[:k]
        return [
            {
                "feature": feature,
                "max": largest,
                "argmax": int(where),
                "mean": total / tokens,
                "last": value if seen == last else 0.0,
                "fired": count / tokens,
                "tokens": tokens,
            }
            for feature, (largest, where, total, count, value, seen) in best
        ]


class _Read:
    """One reading while its request runs."""

    def __init__(self, reading: Reading, selector: Selector, rows: Sequence[Row], columns: Columns) -> None:
        self.reading, self.selector = reading, selector
        # Only its own columns are kept: a narrow reading must not hold the rows of wide ones.
        first = columns.values.start
        self.own = slice(first, columns.top.stop)
        self.columns = Columns(
            *(slice(part.start - first, part.stop - first) for part in (columns.values, columns.ids, columns.top))
        )
        self.features = [rows[i].feature for i in reading.rows]
        self.tokens, self.last = 0, -1
        self.sums = _Sums(np.array(self.features, dtype=np.int64))
        self.top = _Top()
        self.pending: list[tuple[NDArray[np.int64], NDArray[np.int64], Floats]] = []

    def add(self, positions: NDArray[np.int64], tokens: NDArray[np.int64], rows: Floats) -> None:
        self.tokens += len(positions)
        self.last = int(positions[-1])
        rows = rows[:, self.own]
        if self.features:
            self.sums.add(positions, rows[:, self.columns.values])
        if self.reading.top_k:
            self.top.add(positions, rows[:, self.columns.ids], rows[:, self.columns.top])
        if self.reading.per_token:
            self.pending.append((positions, tokens, rows.copy()))

    def head(self, name_of: NameOf) -> dict[str, Any]:
        reading = self.reading
        return {
            "sae": name_of(reading.site, reading.source),
            "site": str(reading.site),
            "at": "after" if reading.after else "before",
            "features": self.features,
        }

    def new(self, text_of: TextOf | None, *, keep: bool = False) -> dict[str, Any]:
        """The entries of the tokens that were not told yet; empty where no token's values are sent."""
        if not self.reading.per_token:
            return {}
        positions, tokens, rows = self._untold()
        if not keep:
            self.pending = []
        ids = tokens.tolist()
        found: dict[str, Any] = {"positions": positions.tolist(), "tokens": ids}
        if text_of is not None:
            found["text"] = [text_of(token) if token >= 0 else "" for token in ids]
        if self.features:
            found["values"] = rows[:, self.columns.values].tolist()
        if self.reading.top_k:
            pairs = zip(rows[:, self.columns.ids].tolist(), rows[:, self.columns.top].tolist(), strict=True)
            found["top"] = [[[int(i), f] for i, f in zip(*pair, strict=True) if i >= 0] for pair in pairs]
        return found

    def _untold(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        if not self.pending:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, self.columns.top.stop))
        positions, tokens, rows = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        return positions, tokens, rows

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"summary": self.sums.entries(self.tokens)}
        if self.reading.top_k:
            found["top_summary"] = self.top.entries(self.tokens, self.reading.top_k, self.last)
        return found


@dataclass(slots=True)
class _Fired:
    """How often a trigger fired, where first, and how strongly there."""

    count: int = 0
    first: int | None = None
    value: float | None = None


class Reader:
    """What one request has read so far.

    Args:
        program: What it asks.
        prompt_length: ``P``.
    """

    def __init__(self, program: Program, prompt_length: int) -> None:
        self.program, self.prompt_length = program, prompt_length
        self.wholes = whole_reads(program)
        columns, self._trigger_columns, self.width = layout(program)
        rows = {part.site: part.rows for part in program.sites}
        self._reads = [
            _Read(reading, program.selectors[reading.selector], rows[reading.site], own)
            for reading, own in zip(program.readings, columns, strict=True)
        ]
        self._features = [rows[trigger.site][trigger.row] for trigger in program.triggers]
        self._fired = [_Fired() for _ in program.triggers]
        self.seen = -1
        self.told = 0
        """Activations of single tokens that were taken so far, and are told."""
        self.computed = 0
        """Numbers that were taken so far."""
        self.stop: int | None = None
        """The first position where a trigger fired that ends the answer."""
        self.failure: RunFailed | None = None

    def take(self, positions: NDArray[np.int64], tokens: NDArray[np.int64], rows: Floats) -> None:
        """Adds tokens that were read; a position that is computed again, after a preemption, is passed over.

        Args:
            positions: ``[n]`` absolute positions, ascending.
            tokens: ``[n]`` token ids; -1 = not known.
            rows: ``[n, W]`` in the columns of :func:`layout`.
        """
        new = positions > self.seen
        if not new.any():
            return
        positions, tokens, rows = positions[new], tokens[new], rows[new]
        self.seen = int(positions[-1])
        self.computed += rows.size if self._reads else 0  # triggers alone are few, and keep nothing
        if not np.isfinite(rows).all():
            self.failure = NonFinite(NOT_FINITE)
            return
        for read in self._reads:
            held = read.selector.by_position(positions, self.prompt_length)
            if held.any():
                read.add(positions[held], tokens[held], rows[held])
                self.told += int(held.sum()) * values_of(read.reading)
        self._judge(positions, rows[:, self._trigger_columns])

    def _judge(self, positions: NDArray[np.int64], values: Floats) -> None:
        for i, (trigger, fired) in enumerate(zip(self.program.triggers, self._fired, strict=True)):
            selector = self.program.selectors[trigger.selector]
            held = selector.by_position(positions, self.prompt_length) & (values[:, i] > trigger.above)
            if not held.any():
                continue
            fired.count += int(held.sum())
            first = int(held.argmax())
            if fired.first is None:
                fired.first, fired.value = int(positions[first]), float(values[first, i])
            if trigger.stop and (self.stop is None or positions[first] < self.stop):
                self.stop = int(positions[first])

    def new(self, name_of: NameOf, text_of: TextOf | None) -> list[dict[str, Any]] | None:
        """For each reading, the entries of tokens that were not told yet; None where none is told token by token."""
        if not any(read.reading.per_token for read in self._reads):
            return None
        return [read.head(name_of) | read.new(text_of) for read in self._reads]

    def finish(self, name_of: NameOf, text_of: TextOf | None, *, keep: bool = False) -> dict[str, Any]:
        """The end of the block of a choice: its readings with their sums, and what its triggers did.

        Args:
            name_of: From a site and an SAE's fingerprint to its name in the catalog.
            text_of: From a token's id to its text; None = no texts are told.
            keep: Whether what is told now will be told again.
        """
        readings = [read.head(name_of) | read.new(text_of, keep=keep) | read.summary() for read in self._reads]
        triggers = list(self._triggers(name_of))
        stops = [found for found in triggers if found["action"] == "stop" and found["fired"]]
        ended = min(stops, key=lambda found: int(found["first"]), default=None)
        return {"readings": readings, "triggers": triggers, "trigger": ended}

    def _triggers(self, name_of: NameOf) -> Iterator[dict[str, Any]]:
        for trigger, row, fired in zip(self.program.triggers, self._features, self._fired, strict=True):
            yield {
                "sae": name_of(trigger.site, row.source),
                "feature": row.feature,
                "above": trigger.above,
                "action": "stop" if trigger.stop else "flag",
                "fired": fired.count,
                "first": fired.first,
                "value": fired.value,
            }


TOLD = ("positions", "tokens", "text", "values", "top")
"""Keys of a reading whose lists have one entry for each token."""


def extend(whole: list[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
    """Puts the readings of a later piece of an answer behind those of the earlier ones."""
    if not whole:
        whole.extend({} for _ in new)
    for have, more in zip(whole, new, strict=True):
        for key, value in more.items():
            if key in TOLD:
                have.setdefault(key, []).extend(value)
            else:
                have[key] = value
