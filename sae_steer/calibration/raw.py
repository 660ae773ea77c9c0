"""The model's own coordinates at a place, as what an SAE's features are compared with.

Coordinates are dense and signed, and some lie far from zero, where the grid of :mod:`sae_steer.calibration.sketch`
would be too coarse. What is kept is therefore a sample: of each label at most so many observations, each with the same
chance. By the inequality of Dvoretzky, Kiefer and Wolfowitz a distribution function from 4,096 of them is right to
0.021 everywhere, with 95 % confidence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sae_steer.calibration.estimate import density_of, separability, smooth, widening
from sae_steer.calibration.info import CalibrationSettings

SAMPLE = 4096
EDGE = 0.001
"""Share of observations beyond the first and the last bin's outer edge, which those bins take too."""

Floats = NDArray[np.float64]


class Sample:
    """A uniform sample of observations of each label.

    Args:
        width: ``D``.
        labels: ``C``.
        size: Observations of a label.
        seed: Of the draw.
    """

    def __init__(self, width: int, labels: int, size: int = SAMPLE, seed: int = 0) -> None:
        self.size = size
        self._rng = np.random.default_rng(seed)
        self._keys: list[Floats] = [np.zeros(0) for _ in range(labels)]
        self._rows: list[NDArray[np.float32]] = [np.zeros((0, width), dtype=np.float32) for _ in range(labels)]

    def add(self, labels: Sequence[Sequence[int]], x: torch.Tensor) -> None:
        """Adds observations ``x [n, D]``; those with the smallest random keys are the sample."""
        values = x.float().cpu().numpy()
        owner = np.array([i for i, own in enumerate(labels) for _ in own], dtype=np.int64)
        flat = np.array([label for own in labels for label in own], dtype=np.int64)
        for label in np.unique(flat):
            rows = values[owner[flat == label]]
            keys = np.concatenate([self._keys[label], self._rng.random(len(rows))])
            rows = np.concatenate([self._rows[label], rows])
            if keys.size > self.size:
                kept = np.argpartition(keys, self.size)[: self.size]
                keys, rows = keys[kept], rows[kept]
            self._keys[label], self._rows[label] = keys, rows

    def of(self, label: int) -> NDArray[np.float32]:
        """``[n, D]``."""
        return self._rows[label]

    def separability(
        self, documents: Sequence[int], settings: CalibrationSettings, *, shuffled: bool = False
    ) -> Floats:
        """``[D]`` mean Jensen-Shannon distance over pairs of labels of each coordinate.

        Args:
            documents: ``[C]`` texts of each label.
            settings: Bins, pseudo-counts and smoothing.
            shuffled: Of the same observations under labels drawn anew: what chance alone gives.
        """
        rows = np.concatenate(self._rows)
        labels = np.repeat(np.arange(len(self._rows)), [len(part) for part in self._rows])
        if shuffled:
            labels = np.random.default_rng(1).permutation(labels)
        seen = np.bincount(labels, minlength=len(self._rows)).astype(np.float64)
        found = []
        for first in range(0, rows.shape[1], 256):
            counts, bandwidth = _histogram(rows[:, first : first + 256].astype(np.float64), labels, seen.size, settings)
            widen = widening(documents)
            smoothed = smooth(counts, bandwidth[:, None] * widen[None] ** 0.2)
            found.append(separability(density_of(smoothed, seen, settings.alpha * widen, settings.alpha)))
        return np.concatenate(found)


def _histogram(
    values: Floats, labels: NDArray[np.int64], count: int, settings: CalibrationSettings
) -> tuple[Floats, Floats]:
    """``[K, C, B]`` counts of coordinates ``[n, K]`` in equal bins without an atom, and Scott's bandwidth in bins."""
    low, high = np.quantile(values, [EDGE, 1 - EDGE], axis=0)
    width = np.maximum((high - low) / settings.bins, np.finfo(np.float64).tiny)
    bins = np.floor((values - low) / width).clip(0, settings.bins - 1).astype(np.int64)
    size = values.shape[1]
    cells = (np.arange(size)[None] * count + labels[:, None]) * settings.bins + bins
    counts = np.bincount(cells.ravel(), minlength=size * count * settings.bins).astype(np.float64)
    bandwidth = settings.smoothing * values.std(axis=0) * len(values) ** -0.2 / width
    return counts.reshape(size, count, settings.bins), bandwidth
