"""Activations whose densities are known, for tests of the calibration: the synthetic setting of three kinds of feature.

Some features say a label by firing at all (rate), some by how much they fire (amplitude) while all labels fire them
alike, and some are noise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_steer.calibration.info import CalibrationSettings
from sae_steer.calibration.statistics import Active, Statistics

LABELS, FIRING, AMPLITUDE, NOISE = 4, 8, 32, 8
FEATURES = FIRING + AMPLITUDE + NOISE


@dataclass(frozen=True)
class Drawn:
    """``values [N, F]`` float32 and ``labels [N]``."""

    values: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw(count: int, seed: int, *, high: float = 6.0, low: float = 2.0, spread: float = 0.6) -> Drawn:
    """Observations of four labels; a label's own firing-coded features fire on 90 %, others' on 2 %."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(LABELS, size=count)
    values = np.zeros((count, FEATURES))
    for f in range(FEATURES):
        own = labels == f % LABELS
        if f < FIRING:
            fires = rng.random(count) < np.where(own, 0.9, 0.02)
            values[:, f] = np.where(fires, rng.normal(3.0, spread, count), 0)
        elif f < FIRING + AMPLITUDE:
            fires = rng.random(count) < 0.85
            values[:, f] = np.where(fires, rng.normal(np.where(own, high, low), spread), 0)
        else:
            fires = rng.random(count) < 0.3
            values[:, f] = np.where(fires, rng.gamma(2.0, 1.0, count), 0)
    return Drawn(values.clip(0).astype(np.float32), labels)


def settings(**changes: object) -> CalibrationSettings:
    """The usual settings, with some replaced."""
    usual = {
        "bins": 64, "alpha": 0.5, "quantile": 0.999, "smoothing": 1.0, "tokens": "last", "choice": "separability",
        "cap": 64,
    }  # fmt: skip
    return CalibrationSettings(**(usual | changes))


def active(values: NDArray[np.float32]) -> Active:
    """The sparse form of dense activations ``[n, F]``."""
    rows, features = np.nonzero(values > 0)
    return Active(rows.astype(np.int64), features.astype(np.int64), values[rows, features])


def gathered(values: NDArray[np.float32], labels: NDArray[np.int64], count: int, *, chunk: int = 100) -> Statistics:
    """Statistics of dense activations, added some observations at a time."""
    found = Statistics(values.shape[1], count)
    for first in range(0, len(labels), chunk):
        part = slice(first, first + chunk)
        found.add([(int(c),) for c in labels[part]], active(values[part]))
    found.settle()
    return found
