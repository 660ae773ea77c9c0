"""The numbers of a token that is read: one row of them, made from what a step reported at every site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_steer.program import Program
from sae_steer.sites import Site

Floats = NDArray[np.float64]
Tops = dict[tuple[Site, str], tuple[Floats, Floats]]
"""By site and SAE, the numbers of the largest features of each token that is read ``[n, k]``, and their values."""
ReadAt = tuple[Site, bool]
"""A site, and whether its activations after the edits are meant, f', or those before, f."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a reading's numbers are in a row.

    Args:
        values: The named features.
        ids: Numbers of the largest features, the largest first; -1 where fewer are active.
        top: Their activations.
    """

    values: slice
    ids: slice
    top: slice


def layout(program: Program) -> tuple[list[Columns], slice, int]:
    """The columns of each reading, those of the triggers, and how many there are."""
    found: list[Columns] = []
    at = 0
    for reading in program.readings:
        named, k = len(reading.rows), reading.top_k
        found.append(
            Columns(slice(at, at + named), slice(at + named, at + named + k), slice(at + named + k, at + named + 2 * k))
        )
        at += named + 2 * k
    return found, slice(at, at + len(program.triggers)), at + len(program.triggers)


def merged_top(ids: Floats, top: Floats, edited: Floats, after: Floats, k: int) -> tuple[Floats, Floats]:
    """The k largest features of each token after the edits.

    Args:
        ids: ``[n, k + E]`` the largest before any edit, -1 where there is none.
        top: ``[n, k + E]`` their activations; NaN stays NaN.
        edited: ``[E]`` numbers of the edited features.
        after: ``[n, E]`` their new activations.
        k: How many are wanted.
    """
    kept = ~np.isin(ids, edited) & (ids >= 0)
    everything = np.concatenate([np.where(kept, ids, -1), np.broadcast_to(edited, after.shape)], axis=1)
    values = np.concatenate([np.where(kept, top, 0.0), after], axis=1)
    order = np.lexsort((everything, -values), axis=1)[:, :k]
    ids, values = np.take_along_axis(everything, order, 1), np.take_along_axis(values, order, 1)
    values = np.where(values > 0, values, 0.0)
    values[np.isnan(top).any(axis=1)] = np.nan  # the token's residual is not finite
    return np.where(values > 0, ids, -1), values


def edited_rows(program: Program, site: Site, source: str) -> list[int]:
    """The rows of a site that edit features of an SAE."""
    rows = next(part.rows for part in program.sites if part.site == site)
    return [i for i, row in enumerate(rows) if row.source == source and row.selector >= 0]


def whole_reads(program: Program) -> dict[tuple[Site, str], tuple[int, int]]:
    """For each site and SAE whose largest features are read: how many must be found, and on which selectors.

    Edits can move features out of the largest, so that after them as many more must be known.
    """
    found: dict[tuple[Site, str], tuple[int, int]] = {}
    for reading in program.readings:
        if reading.top_k:
            key = reading.site, reading.source
            k, mask = found.get(key, (0, 0))
            more = len(edited_rows(program, *key)) if reading.after else 0
            found[key] = max(k, reading.top_k + more), mask | 1 << reading.selector
    return found


def needed_rows(program: Program) -> dict[ReadAt, list[int]]:
    """The rows whose activations a program's readings and triggers are made from, rising."""
    found: dict[ReadAt, set[int]] = {}
    for reading in program.readings:
        rows = found.setdefault((reading.site, reading.after), set())
        rows.update(reading.rows)
        if reading.top_k and reading.after:
            rows.update(edited_rows(program, reading.site, reading.source))
    for trigger in program.triggers:
        found.setdefault((trigger.site, False), set()).add(trigger.row)
    return {place: sorted(rows) for place, rows in found.items() if rows}


def read_rows(
    program: Program,
    count: int,
    activations: Mapping[ReadAt, Floats],
    tops: Tops,
    places: Mapping[ReadAt, Sequence[int]] | None = None,
) -> Floats:
    """The rows that :meth:`Reader.take` wants, from what a step reported.

    Args:
        program: What the request asks.
        count: ``n``, tokens that are read.
        activations: ``[n, K]`` each.
        tops: The largest features.
        places: Which row of the program each column of ``activations`` is; None = they are all.

    Returns:
        ``[n, W]``.
    """
    columns, triggers, width = layout(program)
    found = np.zeros((count, width))
    where = {place: {row: column for column, row in enumerate(rows)} for place, rows in (places or {}).items()}

    def at(place: ReadAt, rows: Sequence[int]) -> Floats:
        """``[n, len(rows)]``, activations of some rows."""
        return activations[place][:, list(rows) if places is None else [where[place][row] for row in rows]]

    for reading, own in zip(program.readings, columns, strict=True):
        place = reading.site, reading.after
        if reading.rows:
            found[:, own.values] = at(place, reading.rows)
        if reading.top_k:
            ids, top = tops[reading.site, reading.source]
            if reading.after:
                edited = edited_rows(program, reading.site, reading.source)
                rows = next(part.rows for part in program.sites if part.site == reading.site)
                numbers = np.array([rows[i].feature for i in edited], dtype=np.float64)
                new = at(place, edited) if edited else np.zeros((count, 0))
                ids, top = merged_top(ids, top, numbers, new, reading.top_k)
            found[:, own.ids], found[:, own.top] = -1, 0
            k = min(reading.top_k, ids.shape[1])
            found[:, own.ids.start : own.ids.start + k] = ids[:, :k]
            found[:, own.top.start : own.top.start + k] = top[:, :k]
    for i, trigger in enumerate(program.triggers):
        found[:, triggers.start + i] = at((trigger.site, False), [trigger.row])[:, 0]
    return found
