"""Ratios of paired measurements, with intervals."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap, t

from sae_steer_bench.records import Interval, Ratio

CONFIDENCE = 0.95
AGAIN = 0.99
"""So that of the twenty ratios of a table rarely one lies outside by chance."""
_RESAMPLES = 9999


def paired_ratio(values: Sequence[float], base: Sequence[float], *, seed: int = 0) -> Interval:
    """The median of the ratios of pairs, with its bootstrap interval.

    The interval is the percentile one (Efron 1979) over rounds: what is drawn again is a round with both its
    measurements, so that what a round had in common stays out of it. With five rounds it is from the least ratio to
    the largest.

    Args:
        values: ``[rounds]`` what is compared.
        base: ``[rounds]`` what it is compared with, in the same rounds.
        seed: Of the resampling.

    Raises:
        ValueError: They are not pairs, or there is none.
    """
    if len(values) != len(base) or not values:
        raise ValueError(f"{len(values)} and {len(base)} measurements are not pairs")
    ratios = np.asarray(values, dtype=float) / np.asarray(base, dtype=float)
    median = float(np.median(ratios))
    # scipy wants two observations, and warns where all are equal; neither has anything to draw.
    if np.ptp(ratios) == 0:
        return Interval(median=median, low=median, high=median)
    found = bootstrap(
        (ratios,),
        np.median,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(median=median, low=float(found.low), high=float(found.high))


def repeatable_ratio(values: Sequence[float], base: Sequence[float], *, seed: int = 0) -> Ratio:
    """:func:`paired_ratio`, and where the median of another run of as many rounds lies with 99 %.

    An interval of the true median is too narrow for that: another run's median is off by as much again. The median of n
    normal numbers has a standard error of ``s sqrt(pi / 2n)``, and the difference of two such medians ``sqrt(2)`` times
    that; here s is that of the ratios' logarithms, with Student's t for the few rounds that it is from.
    """
    found = paired_ratio(values, base, seed=seed)
    rounds = len(values)
    if rounds < 2:
        return Ratio(**found.model_dump(), again_low=None, again_high=None)
    spread = float(np.std(np.log(np.asarray(values, dtype=float) / np.asarray(base, dtype=float)), ddof=1))
    far = math.exp(float(t.ppf((1 + AGAIN) / 2, rounds - 1)) * spread * math.sqrt(math.pi / rounds))
    return Ratio(**found.model_dump(), again_low=found.median / far, again_high=found.median * far)


def agree(one: Ratio, other: Ratio) -> bool:
    """Whether each median lies where the other run expects it; one of a single round expects nothing."""
    return all(
        a.again_low is None or a.again_high is None or a.again_low <= b.median <= a.again_high
        for a, b in ((one, other), (other, one))
    )
