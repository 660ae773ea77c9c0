"""Ratios of paired measurements, with intervals."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

from sae_steer_bench.records import Interval

CONFIDENCE = 0.95
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


def agree(one: Interval, other: Interval) -> bool:
    """Whether each median lies within the other's interval."""
    return other.low <= one.median <= other.high and one.low <= other.median <= one.high
