"""The estimator, literally: one feature, label and bin after another, in float64, from the activations themselves.

Slow on purpose, and sharing no code with :mod:`sae_steer.calibration.estimate`, which is held against it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def densities(
    values: Sequence[float],
    labels: Sequence[int],
    documents: Sequence[int],
    *,
    bins: int,
    alpha: float,
    quantile: float,
    smoothing: float,
) -> tuple[float, Floats]:
    """Bin width and ``P(bin | label) [C, 1 + B]`` of one feature; it must have fired.

    Args:
        values: The activation on each observation.
        labels: The label of each.
        documents: Texts of each label.
        bins: ``B``.
        alpha: Pseudo-counts.
        quantile: Of the positives, where the last bin ends.
        smoothing: Multiple of Scott's bandwidth.
    """
    count = len(documents)
    positive = [float(a) for a in values if a > 0]
    width = float(np.quantile(positive, quantile)) / bins
    mean = math.fsum(positive) / len(positive)
    spread = math.sqrt(math.fsum((a - mean) ** 2 for a in positive) / len(positive))
    scott = spread * len(positive) ** -0.2 / width
    cells = np.zeros((count, 1 + bins))
    for a, c in zip(values, labels, strict=True):
        b = 0 if a <= 0 else 1 + min(int(a / width), bins - 1)
        cells[c, b] += 1
    seen = [int(cells[c].sum()) for c in range(count)]
    widen = [50 / min(max(n, 1), 50) for n in documents]
    smoothed = np.zeros_like(cells)
    for c in range(count):
        smoothed[c, 0] = cells[c, 0]
        h = max(smoothing * scott * widen[c] ** 0.2, 1e-3)
        for source in range(bins):
            weights = [math.exp(-0.5 * ((target - source) / h) ** 2) for target in range(bins)]
            for target in range(bins):
                smoothed[c, 1 + target] += cells[c, 1 + source] * weights[target] / sum(weights)
    total = sum(seen)
    eta = alpha / ((bins + 1) * total)
    found = np.zeros_like(cells)
    for c in range(count):
        for b in range(1 + bins):
            pooled = sum(smoothed[k, b] for k in range(count)) / total
            own = (smoothed[c, b] + alpha * widen[c] * pooled) / (seen[c] + alpha * widen[c])
            found[c, b] = (own + eta) / (1 + (bins + 1) * eta)
    return width, found


def posterior(density: Floats, prior: Sequence[float], concept: int, bin_number: int) -> float:
    """``P(concept | bin)`` by Bayes' rule; bin 0 is the atom."""
    joint = [p * float(row[bin_number]) for p, row in zip(prior, density, strict=True)]
    return joint[concept] / math.fsum(joint)


def auroc(values: Sequence[float], labels: Sequence[int], concept: int) -> float:
    """Share of pairs in which the concept's observation has the larger positive part; ties count half."""
    own = [max(float(a), 0.0) for a, c in zip(values, labels, strict=True) if c == concept]
    rest = [max(float(a), 0.0) for a, c in zip(values, labels, strict=True) if c != concept]
    wins = sum((a > b) + (a == b) / 2 for a in own for b in rest)
    return wins / (len(own) * len(rest))


def jensen_shannon(p: Sequence[float], q: Sequence[float]) -> float:
    """Jensen-Shannon distance in bits."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += (a * math.log2(a / middle) if a else 0.0) + (b * math.log2(b / middle) if b else 0.0)
    return math.sqrt(max(total / 2, 0.0))
