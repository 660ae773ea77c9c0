"""Runs a whole file through an engine, in shards, and gives the statistics of all of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sae_steer.calibration.data import Columns, Reader
from sae_steer.calibration.harvest import Progress, Window, windows
from sae_steer.calibration.shards import Shards
from sae_steer.calibration.statistics import Statistics
from sae_steer.errors import DataError

SHARD_SECONDS = 30.0
"""How much work a kill may cost, in seconds; later a twentieth of what was done, so that shards stay few."""
_COUNTS = ("texts", "tokens", "cut", "unseen")


class Engine(Protocol):
    """What runs a model over texts and adds what its features did: transformers here, or vLLM where it is served."""

    def run(self, window: Window, into: Statistics, progress: Progress) -> None:
        """Runs a window."""
        ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was gathered.

    Args:
        statistics: Of all texts.
        progress: How much was run, in earlier runs too.
        resumed: Texts that earlier runs had done.
    """

    statistics: Statistics
    progress: Progress
    resumed: int


def gather(
    engine: Engine,
    path: Path,
    columns: Columns,
    shards: Shards,
    *,
    features: int,
    labels: int,
    limit: int = 2**24,
    every: float = SHARD_SECONDS,
    report: Callable[[Progress], object] | None = None,
) -> Gathered:
    """Gathers the statistics of a surveyed file, from where an earlier run of the same settings was.

    Args:
        engine: The model.
        path: The file.
        columns: Where its texts and labels are.
        shards: Where partial statistics are kept.
        features: ``F``.
        labels: ``C``.
        limit: Bins of the histograms, 16 bytes each.
        every: Seconds of work in a shard.
        report: Told of the progress after each window.

    Raises:
        DataError: A text cannot be used, the file is no longer what was surveyed, or a shard is not the next one.
    """
    total, progress = Statistics(features, labels, limit), Progress()
    offset = line = 0
    for tensors, about in shards.read():
        if about.get("start") != str(offset):
            raise DataError(
                f"{shards.folder} holds a shard that does not begin at byte {offset}, where the one before it ended. "
                "Begin anew with --restart."
            )
        total.merge(tensors)
        offset, line = int(about["offset"]), int(about["line"])
        progress = Progress(*(int(about[name]) for name in _COUNTS))
    resumed = progress.texts
    if report is not None:
        report(progress)
    part, began, since = Statistics(features, labels, limit), time.monotonic(), time.monotonic()
    start, pending = offset, None
    for window in windows(Reader(path, columns, offset, line)):
        engine.run(window, part, progress)
        pending = window
        if report is not None:
            report(progress)
        now = time.monotonic()
        if now - since >= max(every, (now - began) / 20):
            save(shards, part, total, start, window, progress)
            part, since = Statistics(features, labels, limit), time.monotonic()
            start, pending = window.offset, None
    if pending is not None:
        save(shards, part, total, start, pending, progress)
    total.settle()
    return Gathered(total, progress, resumed)


def save(shards: Shards, part: Statistics, total: Statistics, start: int, window: Window, progress: Progress) -> None:
    """Writes a shard of the statistics from a byte up to and with a window, and adds them to the total."""
    tensors = part.tensors()
    counts = {name: str(getattr(progress, name)) for name in _COUNTS}
    place = {"start": str(start), "offset": str(window.offset), "line": str(window.line)}
    shards.append(tensors, {**place, **counts})
    total.merge(tensors)
