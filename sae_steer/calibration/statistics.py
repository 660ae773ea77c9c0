"""What is kept of the activations of a dictionary while labelled text runs through a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.calibration.sketch import Sketch
from sae_steer.errors import DataError

BUFFERED = 2**21
"""Activations that are gathered before they are sorted."""
_MAX_CELLS = 2**25
"""Pairs of feature and label, of 24 bytes each, in two copies while a run is gathered."""


@dataclass(frozen=True, slots=True)
class Active:
    """The positive activations of some observations.

    Args:
        rows: ``[n]`` int64, which observation.
        features: ``[n]`` int64.
        values: ``[n]`` float32, above zero.
    """

    rows: NDArray[np.int64]
    features: NDArray[np.int64]
    values: NDArray[np.float32]


class Statistics:
    """Of ``F`` features and ``C`` labels: how often each fired, its sums, and its histogram.

    An observation with several labels counts once for each of them.

    Args:
        features: ``F``.
        labels: ``C``.
        limit: Bins of the histogram, 16 bytes each.

    Raises:
        DataError: There are more pairs of feature and label than fit into memory.
    """

    def __init__(self, features: int, labels: int, limit: int = 2**24) -> None:
        if features * labels > _MAX_CELLS:
            raise DataError(
                f"{features} features with {labels} labels are more than {_MAX_CELLS} pairs. Rename labels that are "
                "not asked for to one, with --label-name VALUE=rest."
            )
        self.features, self.labels = features, labels
        self.sketch = Sketch(limit)
        self.observations: NDArray[np.int64] = np.zeros(labels, dtype=np.int64)
        self.fired: NDArray[np.int64] = np.zeros((features, labels), dtype=np.int64)
        self.total: NDArray[np.float64] = np.zeros((features, labels))
        self.squares: NDArray[np.float64] = np.zeros((features, labels))
        self._cells: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []
        self._held = 0

    def add(self, labels: Sequence[Sequence[int]], active: Active) -> None:
        """Adds observations.

        Args:
            labels: For each observation, the numbers of its labels.
            active: What fired on them.
        """
        counts = np.array([len(own) for own in labels], dtype=np.int64)
        flat = np.array([label for own in labels for label in own], dtype=np.int64)
        self.observations += np.bincount(flat, minlength=self.labels)
        if not active.rows.size:
            return
        if (counts == 1).all():
            cells, values = active.features * self.labels + flat[active.rows], active.values
        else:
            # Each activation once for each label of its observation.
            times = counts[active.rows]
            first = np.repeat(counts.cumsum()[active.rows] - times, times)
            within = np.arange(times.sum()) - np.repeat(times.cumsum() - times, times)
            cells = np.repeat(active.features, times) * self.labels + flat[first + within]
            values = np.repeat(active.values, times)
        self._cells.append(cells)
        self._values.append(values)
        self._held += cells.size
        if self._held >= BUFFERED:
            self.settle()

    def settle(self) -> None:
        """Sorts what was gathered into the sums and the histogram."""
        if not self._held:
            return
        cells, values = np.concatenate(self._cells), np.concatenate(self._values)
        self._cells, self._values, self._held = [], [], 0
        size, shape = self.features * self.labels, (self.features, self.labels)
        exact = values.astype(np.float64)
        self.fired += np.bincount(cells, minlength=size).reshape(shape)
        self.total += np.bincount(cells, weights=exact, minlength=size).reshape(shape)
        self.squares += np.bincount(cells, weights=exact * exact, minlength=size).reshape(shape)
        self.sketch.add(cells, values)

    def merge(self, other: dict[str, Tensor]) -> None:
        """Adds what :meth:`tensors` gave."""
        part = {name: tensor.numpy() for name, tensor in other.items()}
        self.observations += part["observations"]
        where = part["cells"]
        for name in ("fired", "total", "squares"):
            getattr(self, name).reshape(-1)[where] += part[name]
        self.sketch.merge(part["keys"], part["counts"], int(part["precision"][0]))

    def tensors(self) -> dict[str, Tensor]:
        """Everything, with the sums of those pairs only that fired."""
        self.settle()
        cells = np.flatnonzero(self.fired)
        arrays = {
            "observations": self.observations,
            "cells": cells,
            "fired": self.fired.reshape(-1)[cells],
            "total": self.total.reshape(-1)[cells],
            "squares": self.squares.reshape(-1)[cells],
            "keys": self.sketch.keys,
            "counts": self.sketch.counts,
            "precision": np.array([self.sketch.precision]),
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
