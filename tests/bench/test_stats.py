"""Ratios and their intervals: known values, scipy's own, and how often they hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from sae_steer_bench.records import Ratio
from sae_steer_bench.stats import agree, paired_ratio, repeatable_ratio

times = st.floats(min_value=1e-3, max_value=1e3)


def test_a_known_ratio() -> None:
    found = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


def test_five_rounds_give_the_least_and_the_largest() -> None:
    ratios = [1.0, 1.1, 1.2, 1.3, 1.9]
    found = paired_ratio(ratios, [1.0] * 5)
    assert (found.low, found.median, found.high) == (1.0, 1.2, 1.9)


def test_it_is_scipys_interval() -> None:
    chance = np.random.default_rng(3)
    base = chance.uniform(1, 2, 40)
    values = base * chance.normal(1.05, 0.02, 40)
    expected = bootstrap(
        (values / base,), np.median, n_resamples=9999, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    found = paired_ratio(values.tolist(), base.tolist(), seed=7)
    assert (found.low, found.high) == (expected.low, expected.high)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=12))
def test_the_interval_holds_its_median(pairs: list[tuple[float, float]]) -> None:
    found = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    ratios = [a / b for a, b in pairs]
    assert min(ratios) <= found.low <= found.median <= found.high <= max(ratios)


def drifting(chance: np.random.Generator) -> tuple[list[float], list[float]]:
    """Rounds of a machine that drifts by a factor of three, where a case costs 5 % more."""
    drift = np.exp(chance.normal(0, 0.5, 15))
    return (1.05 * drift * chance.normal(1, 0.01, 15)).tolist(), (drift * chance.normal(1, 0.01, 15)).tolist()


def test_pairs_take_the_drift_out_and_the_interval_holds_the_truth() -> None:
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        found = paired_ratio(*drifting(chance))
        held += found.low <= 1.05 <= found.high
        assert found.high - found.low < 0.06
    assert held >= 88  # 95 are expected; the median's percentile interval falls a little short in few rounds


def test_without_pairs_the_drift_would_stay_in() -> None:
    values, base = drifting(np.random.default_rng(0))
    unpaired = paired_ratio(values, base[1:] + base[:1])
    assert unpaired.high - unpaired.low > 0.3


@pytest.mark.parametrize(("values", "base"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_is_no_pair(values: list[float], base: list[float]) -> None:
    with pytest.raises(ValueError, match="are not pairs"):
        paired_ratio(values, base)


def runs(chance: np.random.Generator, rounds: int, cost: float = 1.05) -> Ratio:
    """One run, whose rounds are now and then far off."""
    noise = chance.normal(0, 0.05, (2, rounds)) + (chance.random((2, rounds)) < 0.1) * 0.15
    values, base = np.exp(noise)
    return repeatable_ratio((cost * values).tolist(), base.tolist())


@pytest.mark.parametrize("rounds", [5, 12])
def test_two_runs_of_one_thing_agree(rounds: int) -> None:
    chance = np.random.default_rng(1)
    pairs = [(runs(chance, rounds), runs(chance, rounds)) for _ in range(150)]
    assert sum(agree(*pair) for pair in pairs) >= 146
    # The intervals of the true median would say so far less often.
    narrow = [(a.low <= b.median <= a.high) and (b.low <= a.median <= b.high) for a, b in pairs]
    assert sum(narrow) <= 135


def test_what_has_changed_does_not_agree() -> None:
    chance = np.random.default_rng(2)
    assert not any(agree(runs(chance, 12), runs(chance, 12, cost=1.6)) for _ in range(20))


def test_where_another_run_lies_by_hand() -> None:
    """Ratios 1, e and e^2: spread 1; t with 2 degrees of freedom at 99 % is 9.925."""
    found = repeatable_ratio([1.0, math.e, math.e**2], [1.0] * 3)
    assert found.again_high == pytest.approx(math.exp(1 + 9.9248 * math.sqrt(math.pi / 3)), rel=1e-3)
    assert found.again_low == pytest.approx(math.exp(1 - 9.9248 * math.sqrt(math.pi / 3)), rel=1e-3)


def test_one_round_expects_nothing() -> None:
    alone = repeatable_ratio([2.0], [1.0])
    assert (alone.median, alone.again_low, alone.again_high) == (2.0, None, None)
    assert agree(alone, repeatable_ratio([2.0], [1.0]))


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ((1.0, 1.1, 1.2), (1.0, 1.15, 1.3), True),
        ((1.0, 1.1, 1.2), (1.05, 1.3, 1.4), False),  # the second's median is outside the first
        ((1.0, 1.1, 1.4), (1.2, 1.3, 1.4), False),  # the first's is outside the second
    ],
)
def test_agreement(one: tuple[float, ...], other: tuple[float, ...], verdict: bool) -> None:
    first, second = (
        Ratio(median=median, low=median, high=median, again_low=low, again_high=high)
        for low, median, high in (one, other)
    )
    assert agree(first, second) == agree(second, first) == verdict
