"""From statistics to densities: what each feature's activation says of each label.

For feature f, label c, ``B`` equal bins of positive activations up to the pooled quantile, and an atom for f <= 0::

    n_b    positives of c in bin b, smoothed over bins only, so that nothing crosses the atom; n_0 = N_c - fired
    q_b    the same pooled over all labels, as a share of all N = sum N_c observations
    P(b|c) = ((n_b + alpha_c q_b) / (N_c + alpha_c) + eta) / (1 + (B + 1) eta),   eta = alpha / ((B + 1) N)

Densities are of one observation, not of one firing: the firing rate stays in them, and a feature that fires mostly for
one label says so even where the shape of its activations does not. ``alpha_c`` draws labels with little text towards
the pooled density, which says nothing about labels, and ``eta`` is the same for all labels, so that a bin in which
nothing was seen says nothing either. The literal form of this is :mod:`sae_steer.calibration.reference`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_steer.calibration.info import CalibrationSettings
from sae_steer.calibration.statistics import Statistics

ENOUGH = 50
"""Texts of a label below which its density is widened."""
_BLOCK = 2**21  # numbers of a density table that are computed at once

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of some features ``K``, all with ``C`` labels.

    Args:
        features: ``[K]`` int64, their numbers.
        width: ``[K]`` width of a bin.
        density: ``[K, C, 1 + B]`` ``P(bin | label)``, the atom first.
        fired: ``[K, C]`` int64.
        mean: ``[K, C]`` of positive activations; 0 where there are none.
        std: ``[K, C]`` of them.
        auroc: ``[K, C]`` of a label's observations against all others.
        dprime: ``[K, C]`` difference of the means, zeros and all, in pooled standard deviations.
        separability: ``[K]`` mean Jensen-Shannon distance over pairs of labels.
        distance: ``[K, C]`` Jensen-Shannon distance of a label from all others together.
    """

    features: NDArray[np.int64]
    width: Floats
    density: Floats
    fired: NDArray[np.int64]
    mean: Floats
    std: Floats
    auroc: Floats
    dprime: Floats
    separability: Floats
    distance: Floats


def widening(documents: Sequence[int]) -> Floats:
    """``[C]`` how much wider than usual a label's density must be: 50 texts over its own, where it has fewer."""
    return ENOUGH / np.clip(np.asarray(documents, dtype=np.float64), 1, ENOUGH)


def blocks(
    statistics: Statistics, documents: Sequence[int], settings: CalibrationSettings, features: NDArray[np.int64]
) -> Iterator[Estimate]:
    """Estimates of ``features``, some at a time, so that memory stays bounded whatever the dictionary's size.

    Args:
        statistics: What was harvested; settled.
        documents: ``[C]`` texts of each label.
        settings: Bins, pseudo-counts, quantile and smoothing.
        features: ``[K]`` rising; features that never fired have no density and must not be among them.
    """
    labels = statistics.labels
    step = max(1, _BLOCK // (labels * settings.bins + settings.bins**2))
    for first in range(0, features.size, step):
        yield _estimate(statistics, widening(documents), settings, features[first : first + step])


def _estimate(
    statistics: Statistics, widen: Floats, settings: CalibrationSettings, features: NDArray[np.int64]
) -> Estimate:
    fired, total, squares = statistics.fired[features], statistics.total[features], statistics.squares[features]
    seen = statistics.observations.astype(np.float64)
    entries = _Entries.of(statistics, features)
    end = entries.quantile(fired.sum(axis=1), settings.quantile)
    width = end / settings.bins
    positives = entries.histogram(width, settings.bins, statistics.labels)
    bandwidth = settings.smoothing * _scott(fired, total, squares) / width
    smoothed = smooth(positives, bandwidth[:, None] * widen[None] ** 0.2)
    zeros = (seen[None] - fired)[:, :, None]
    density = density_of(np.concatenate([zeros, smoothed], axis=2), seen, settings.alpha * widen, settings.alpha)
    share = seen / seen.sum()
    mean = np.divide(total, fired, out=np.zeros_like(total), where=fired > 0)
    variance = np.divide(squares, fired, out=np.zeros_like(total), where=fired > 0) - mean**2
    return Estimate(
        features=features,
        width=width,
        density=density,
        fired=fired,
        mean=mean,
        std=np.sqrt(variance.clip(0)),
        auroc=entries.auroc(fired, seen),
        dprime=_dprime(total, squares, seen),
        separability=separability(density),
        distance=one_against_rest(density, share),
    )


@dataclass(frozen=True, slots=True)
class _Entries:
    """The fine bins of some features ``K``, sorted by feature, label and bin.

    Args:
        feature: ``[n]`` place of the feature among the K.
        label: ``[n]``.
        code: ``[n]`` number of the fine bin.
        count: ``[n]``.
        low: ``[n]`` where it starts.
        high: ``[n]`` where it ends.
        size: ``K``.
    """

    feature: NDArray[np.int64]
    label: NDArray[np.int64]
    code: NDArray[np.int64]
    count: NDArray[np.int64]
    low: Floats
    high: Floats
    size: int

    @classmethod
    def of(cls, statistics: Statistics, features: NDArray[np.int64]) -> "_Entries":
        sketch, labels = statistics.sketch, statistics.labels
        cells, codes, counts = sketch.of(int(features[0]) * labels, (int(features[-1]) + 1) * labels)
        feature, label = np.divmod(cells, labels)
        place = np.searchsorted(features, feature)
        mine = features[place.clip(max=features.size - 1)] == feature
        low, high = sketch.edges(codes[mine])
        return cls(place[mine], label[mine], codes[mine], counts[mine], low, high, features.size)

    def quantile(self, fired: NDArray[np.int64], share: float) -> Floats:
        """``[K]`` quantile of each feature's positives, interpolated between order statistics as numpy does."""
        order = np.lexsort((self.code, self.feature))
        through = self.count[order].cumsum()
        middle = ((self.low + self.high) / 2)[order]
        before = fired.cumsum() - fired
        rank = (fired - 1) * share
        low = np.floor(rank).astype(np.int64)
        values = [
            middle[np.searchsorted(through, before + np.minimum(k, fired - 1), side="right")] for k in (low, low + 1)
        ]
        found: Floats = values[0] + (values[1] - values[0]) * (rank - low)
        return found

    def histogram(self, width: Floats, bins: int, labels: int) -> Floats:
        """``[K, C, B]`` in equal bins; a fine bin that two of them share is divided by length."""
        start, end = self.low / width[self.feature], self.high / width[self.feature]
        first = np.floor(start).astype(np.int64)
        inside = (np.minimum(end, first + 1) - start) / (end - start)
        row = (self.feature * labels + self.label) * bins
        here, there = np.minimum(first, bins - 1), np.minimum(first + 1, bins - 1)
        cells = np.concatenate([row + here, row + there])
        weights = np.concatenate([self.count * inside, self.count * (1 - inside)])
        found: Floats = np.bincount(cells, weights=weights, minlength=self.size * labels * bins).astype(np.float64)
        return found.reshape(self.size, labels, bins)

    def auroc(self, fired: NDArray[np.int64], seen: Floats) -> Floats:
        """``[K, C]`` probability that an observation of a label is above one of another; ties count half."""
        order = np.lexsort((self.code, self.feature))
        feature, code, label = self.feature[order], self.code[order], self.label[order]
        new = np.concatenate([[True], (feature[1:] != feature[:-1]) | (code[1:] != code[:-1])])
        group = new.cumsum() - 1
        held = np.zeros((group[-1] + 1, seen.size))
        held[group, label] = self.count[order]
        owner = feature[new]
        rest = held.sum(axis=1, keepdims=True) - held
        below = rest.cumsum(axis=0) - rest
        # Sums run over all features: take off what earlier features had, and put this feature's atom below.
        pooled = fired.sum(axis=1, keepdims=True) - fired
        earlier = np.cumsum(pooled, axis=0) - pooled
        others = seen.sum() - seen
        zeros, rest_zeros = seen - fired, others - pooled
        wins = held * (below - earlier[owner] + rest_zeros[owner] + rest / 2)
        sums = np.zeros(fired.shape)
        np.add.at(sums, owner, wins)
        pairs = seen * others
        found: Floats = np.divide(sums + zeros * rest_zeros / 2, pairs, out=np.full(fired.shape, 0.5), where=pairs > 0)
        return found


def _scott(fired: NDArray[np.int64], total: Floats, squares: Floats) -> Floats:
    """``[K]`` Scott's bandwidth ``std n^(-1/5)`` of the pooled positives."""
    n = fired.sum(axis=1)
    mean = total.sum(axis=1) / n
    found: Floats = np.sqrt((squares.sum(axis=1) / n - mean**2).clip(0)) * n**-0.2
    return found


def smooth(positives: Floats, bandwidth: Floats) -> Floats:
    """Spreads ``[K, C, B]`` counts by a Gaussian of ``bandwidth [K, C]`` bins, each bin's mass over bins alone."""
    bins = positives.shape[2]
    apart = (np.arange(bins)[:, None] - np.arange(bins)[None]) ** 2
    found = np.empty_like(positives)
    kernel = np.zeros(0)
    for label in range(positives.shape[1]):
        h = bandwidth[:, label].clip(1e-3)  # below that nothing is spread: exp(-1 / 2h^2) is zero
        if not label or (bandwidth[:, label] != bandwidth[:, label - 1]).any():
            kernel = np.exp(-0.5 * apart[None] / (h**2)[:, None, None])
            kernel /= kernel.sum(axis=1, keepdims=True)
        found[:, label] = np.einsum("kij,kj->ki", kernel, positives[:, label])
    return found


def density_of(counts: Floats, seen: Floats, alphas: Floats, alpha: float) -> Floats:
    """``P(cell | label)`` as above from ``counts [K, C, n]`` of ``seen [C]`` observations."""
    pooled = counts.sum(axis=1, keepdims=True) / seen.sum()
    cells = counts.shape[2]
    eta = alpha / (cells * seen.sum())
    own = (counts + alphas[None, :, None] * pooled) / (seen + alphas)[None, :, None]
    found: Floats = (own + eta) / (1 + cells * eta)
    return found


def _dprime(total: Floats, squares: Floats, seen: Floats) -> Floats:
    """``(mean_c - mean_rest) / sqrt((var_c + var_rest) / 2)`` over all observations; 0 where nothing varies."""
    others = seen.sum() - seen
    mean, rest = total / seen.clip(1), (total.sum(axis=1, keepdims=True) - total) / others.clip(1)
    own = squares / seen.clip(1) - mean**2
    theirs = (squares.sum(axis=1, keepdims=True) - squares) / others.clip(1) - rest**2
    spread = np.sqrt(((own + theirs) / 2).clip(0))
    found: Floats = np.divide(mean - rest, spread, out=np.zeros_like(mean), where=spread > 0)
    return found


def separability(density: Floats) -> Floats:
    """``[K]`` mean Jensen-Shannon distance, base 2, over pairs of labels of ``density [K, C, n]``; in [0, 1]."""
    labels = density.shape[1]
    sums, pairs = np.zeros(density.shape[0]), 0
    for i in range(labels):
        for j in range(i + 1, labels):
            sums += jensen_shannon(density[:, i], density[:, j])
            pairs += 1
    return sums / max(pairs, 1)


def one_against_rest(density: Floats, share: Floats) -> Floats:
    """``[K, C]`` Jensen-Shannon distance of each label from the others, pooled by their ``share [C]``."""
    pooled = np.einsum("kcb,c->kb", density, share)
    found = np.empty(density.shape[:2])
    for c, own in enumerate(share):
        rest = (pooled - own * density[:, c]) / max(1 - own, 1e-12)
        found[:, c] = jensen_shannon(density[:, c], rest.clip(0))
    return found


def jensen_shannon(p: Floats, q: Floats) -> Floats:
    """Square root of the Jensen-Shannon divergence in bits, over the last axis; in [0, 1]."""
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * np.log2(p / middle), 0)
        right = np.where(q > 0, q * np.log2(q / middle), 0)
    found: Floats = np.sqrt(((left + right).sum(axis=-1) / 2).clip(0, 1))
    return found
