"""The streaming estimator against the literal one, and the two mistakes that nobody would notice otherwise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score

from sae_steer.calibration import reference
from sae_steer.calibration.choose import calibration_of, choose
from sae_steer.calibration.estimate import Estimate, blocks, jensen_shannon, one_against_rest, separability
from sae_steer.calibration.statistics import Statistics
from sae_steer.errors import DataError
from tests.calibration_cases import AMPLITUDE, FEATURES, FIRING, LABELS, Drawn, active, draw, gathered, settings

USUAL = settings()


def estimate(drawn: Drawn, features: list[int] | None = None, count: int = LABELS) -> Estimate:
    """One block of estimates of drawn activations."""
    statistics = gathered(drawn.values, drawn.labels, count)
    documents = np.bincount(drawn.labels, minlength=count).tolist()
    alive = np.flatnonzero(statistics.fired.sum(axis=1))
    wanted = alive if features is None else np.array(features)
    [found] = blocks(statistics, documents, USUAL, wanted)
    return found


def literal(values: NDArray[np.float32], labels: NDArray[np.int64], count: int = LABELS) -> tuple[float, np.ndarray]:
    """Width and densities of one feature by the reference."""
    documents = np.bincount(labels, minlength=count).tolist()
    options = {"bins": USUAL.bins, "alpha": USUAL.alpha, "quantile": USUAL.quantile, "smoothing": USUAL.smoothing}
    return reference.densities(values.tolist(), labels.tolist(), documents, **options)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(2000, seed=1)


@pytest.fixture(scope="module")
def found(drawn: Drawn) -> Estimate:
    return estimate(drawn)


@pytest.mark.parametrize("feature", [0, 3, FIRING, FIRING + 5, FEATURES - 1])
def test_densities_are_the_literal_ones(drawn: Drawn, found: Estimate, feature: int) -> None:
    width, density = literal(drawn.values[:, feature], drawn.labels)
    # What the fine bins lose: a number is known to 0.4 %, of which some cross an edge of a bin.
    assert found.width[feature] == pytest.approx(width, rel=2**-8)
    assert found.density[feature].sum(axis=1) == pytest.approx(1, abs=1e-12)
    assert np.abs(found.density[feature] - density).max() < 0.004
    assert np.abs(found.density[feature] - density).sum(axis=1).max() < 0.03
    np.testing.assert_allclose(found.density[feature][:, 0], density[:, 0], rtol=1e-9)  # the atom is exact


def test_the_error_of_the_sketch_is_what_it_says(drawn: Drawn) -> None:
    statistics = gathered(drawn.values, drawn.labels, LABELS)
    for feature in range(FEATURES):
        _, codes, counts = statistics.sketch.of(feature * LABELS, (feature + 1) * LABELS)
        low, high = statistics.sketch.edges(codes)
        values = np.sort(drawn.values[:, feature][drawn.values[:, feature] > 0])
        order = np.argsort(low, kind="stable")
        kept = np.repeat(low[order], counts[order]), np.repeat(high[order], counts[order])
        assert (kept[0] <= values).all()
        assert (values < kept[1]).all()
        assert ((kept[1] - kept[0]) <= values * statistics.sketch.error).all()


def test_numbers_beside_the_densities(drawn: Drawn, found: Estimate) -> None:
    for feature in (0, FIRING, FEATURES - 1):
        values = drawn.values[:, feature].astype(np.float64)
        for label in range(LABELS):
            own = drawn.labels == label
            fired = values[own & (values > 0)]
            assert found.fired[feature, label] == fired.size
            assert found.mean[feature, label] == pytest.approx(fired.mean(), rel=1e-9)
            assert found.std[feature, label] == pytest.approx(fired.std(), rel=1e-6)
            assert found.auroc[feature, label] == pytest.approx(roc_auc_score(own, values), abs=2e-3)
            spread = np.sqrt((values[own].var() + values[~own].var()) / 2)
            assert found.dprime[feature, label] == pytest.approx((values[own].mean() - values[~own].mean()) / spread)


def test_auroc_of_the_reference_is_the_rank_test() -> None:
    values, labels = [0.0, 0.0, 1.0, 2.0, 2.0, 5.0], [0, 1, 0, 1, 0, 1]
    ranked = stats.mannwhitneyu([0.0, 2.0, 5.0], [0.0, 1.0, 2.0]).statistic / 9
    assert reference.auroc(values, labels, 1) == pytest.approx(ranked)


def test_distances_are_scipys(found: Estimate, drawn: Drawn) -> None:
    p, q = found.density[0, 0], found.density[0, 1]
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2))
    assert reference.jensen_shannon(p.tolist(), q.tolist()) == pytest.approx(jensenshannon(p, q, base=2))
    pairs = [jensenshannon(found.density[0, i], found.density[0, j], base=2) for i in range(4) for j in range(i)]
    assert found.separability[0] == pytest.approx(np.mean(pairs))
    share = np.bincount(drawn.labels) / drawn.labels.size
    rest = (share[1:, None] * found.density[0, 1:]).sum(axis=0) / share[1:].sum()
    assert found.distance[0, 0] == pytest.approx(jensenshannon(p, rest, base=2))


def test_distances_have_the_right_ends() -> None:
    apart = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]])
    assert separability(apart).tolist() == [1.0, 0.0]
    assert one_against_rest(apart, np.array([0.5, 0.5])).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def gains(density: np.ndarray, label: int) -> np.ndarray:
    """``1 - P(label | bin)`` of positive bins under a uniform prior, for densities ``[K, C, 1 + B]``."""
    return 1 - density[:, label, 1:] / density[:, :, 1:].sum(axis=1)


def test_the_table_is_bayes_at_the_centres_of_bins(drawn: Drawn) -> None:
    statistics = gathered(drawn.values, drawn.labels, LABELS)
    documents = np.bincount(drawn.labels).tolist()
    choice = choose(statistics, documents, USUAL, [0])
    record = calibration_of(statistics, documents, USUAL, [0], choice)
    table = gains(np.exp(record.log_density.double().numpy()), 0)
    for row, feature in enumerate(record.features.tolist()):
        _, density = literal(drawn.values[:, feature], drawn.labels)
        [own] = blocks(statistics, documents, USUAL, np.array([feature]))
        for b in range(0, USUAL.bins, 7):
            direct = reference.posterior(own.density[0], [0.25] * LABELS, 0, 1 + b)
            assert table[row, b] == pytest.approx(1 - direct, abs=1e-3)
            if density[:, 1 + b].max() > 0.005:  # where the literal one has more than a handful of activations
                assert table[row, b] == pytest.approx(1 - reference.posterior(density, [0.25] * 4, 0, 1 + b), abs=0.12)


def suppressed(density: np.ndarray, width: np.ndarray, drawn: Drawn, features: np.ndarray) -> np.ndarray:
    """What is left of the target's evidence, ``[N]``: mean share of the features' activation that remains."""
    table = gains(density, 0)
    values = drawn.values[:, features].astype(np.float64)
    bins = np.minimum((values / width).astype(int), USUAL.bins - 1)
    after = values * np.where(values > 0, table[np.arange(len(features))[None], bins], 1)
    return after.sum(axis=1) / np.maximum(values.sum(axis=1), 1e-9)


def test_dropping_the_firing_rate_fails_measurably(drawn: Drawn, found: Estimate) -> None:
    own = np.array([f for f in range(FIRING) if f % LABELS == 0])
    held_out = draw(2000, seed=2)
    target = held_out.labels == 0
    dropped = found.density.copy()
    dropped[:, :, 0] = 0
    dropped /= dropped.sum(axis=2, keepdims=True)  # densities of a firing, not of an observation
    right = suppressed(found.density[own], found.width[own], held_out, own)[target].mean()
    wrong = suppressed(dropped[own], found.width[own], held_out, own)[target].mean()
    assert right < 0.15, "a feature that fires nearly only for the target is nearly removed"
    assert wrong > 0.5, "and without the firing rate it would be left at 1 - prior"


def test_smoothing_across_zero_fails_measurably() -> None:
    # A feature that is silent on most observations of the others, and weak where it fires for them.
    rng = np.random.default_rng(3)
    labels = rng.integers(2, size=4000)
    fires = rng.random(4000) < np.where(labels == 0, 0.8, 0.1)
    values = np.where(fires, rng.gamma(2.0, 1.0, 4000), 0).astype(np.float32)
    found = estimate(Drawn(values[:, None], labels), count=2)
    width = float(found.width[0])
    right = gains(found.density, 0)[0]
    # The variant: the zeros are numbers like others, and the kernel spreads them over the first bins.
    h = values.std() * labels.size**-0.2 / width
    spread = np.empty((1, 2, 65))
    for label in range(2):
        counts = np.bincount(np.minimum((values[labels == label] / width).astype(int), 63), minlength=64).astype(float)
        kernel = np.exp(-0.5 * ((np.arange(64)[:, None] - np.arange(64)[None]) / h) ** 2)
        spread[0, label] = np.r_[1e-9, kernel / kernel.sum(axis=0) @ counts] / (labels == label).sum()
    wrong = gains(spread, 0)[0]
    weak = slice(0, 4)
    truth = 1 - 0.8 / 0.9  # both labels fire with one shape: only the rates tell them apart
    assert np.abs(right[weak] - truth).max() < 0.08
    assert np.abs(wrong[weak] - truth).max() > 0.4


def test_shuffled_labels_say_nothing(drawn: Drawn) -> None:
    shuffled = Drawn(drawn.values, np.random.default_rng(4).permutation(drawn.labels))
    density = estimate(shuffled).density
    table, weight = gains(density, 0), density[:, :, 1:].mean(axis=1)
    assert np.average(table, weights=weight) == pytest.approx(1 - 1 / LABELS, abs=0.01)
    often = weight > 0.01
    assert np.abs(table[often] - 0.75).max() < 0.2
    assert np.abs(table[often] - 0.75).mean() < 0.04


def test_labels_are_recovered(drawn: Drawn) -> None:
    statistics = gathered(drawn.values, drawn.labels, LABELS)
    documents = np.bincount(drawn.labels).tolist()
    for how in ("separability", "dprime"):
        choice = choose(statistics, documents, settings(choice=how, cap=10), [0, 2])
        for concept, found in zip((0, 2), choice.candidates, strict=True):
            own = {f for f in range(FIRING + AMPLITUDE) if f % LABELS == concept}
            assert {c.feature for c in found} == own
            assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)


def test_a_feature_that_is_silent_for_the_concept_is_not_chosen() -> None:
    labels = np.arange(400) % 2
    values = np.where(labels == 1, 3.0, 0.0).astype(np.float32)[:, None]
    statistics = gathered(values, labels, 2)
    choice = choose(statistics, [200, 200], USUAL, [0, 1])
    assert [len(found) for found in choice.candidates] == [0, 1]
    with pytest.raises(DataError, match="nothing to choose"):
        calibration_of(statistics, [200, 200], USUAL, [0, 1], choice)


def test_dead_features_are_counted_and_left_out() -> None:
    drawn = draw(500, seed=5)
    drawn.values[:, [7, 9]] = 0
    statistics = gathered(drawn.values, drawn.labels, LABELS)
    choice = choose(statistics, [125] * 4, USUAL, [0])
    assert choice.never_fired == 2
    assert not {7, 9} & set(choice.alive.tolist())


def test_few_texts_of_a_label_say_less() -> None:
    # Three texts of the target fire a feature that half of the others fire too, with the same shape.
    rng = np.random.default_rng(7)
    labels = np.r_[np.zeros(3, dtype=np.int64), np.ones(997, dtype=np.int64)]
    values = np.r_[[1.0, 2.0, 3.0], rng.gamma(4.0, 0.5, 997) * (np.arange(997) % 2)].astype(np.float32)
    statistics = gathered(values[:, None], labels, 2)
    [few] = blocks(statistics, [3, 997], USUAL, np.array([0]))
    [many] = blocks(statistics, [60, 997], USUAL, np.array([0]))  # as if there were texts enough
    weight = few.density[0, 1, 1:]
    away = [np.average(np.abs(gains(found.density, 0)[0] - 0.5), weights=weight) for found in (few, many)]
    assert away[0] < away[1] - 0.05, "with three texts the posterior is nearer to the prior"
    # and where nothing was seen, it is the prior: no label gets the benefit of its small number
    empty = np.flatnonzero(few.density[0].max(axis=0)[1:] < 1e-5)
    assert gains(few.density, 0)[0, empty] == pytest.approx(0.5, abs=0.02)


@given(st.data())
def test_the_sketch_is_the_same_in_any_order_and_in_parts(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    values = np.array(
        data.draw(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=count, max_size=count)), np.float32
    )
    features = np.array(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)), np.int64)
    labels = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), min_size=count,
                                max_size=count))  # fmt: skip
    whole = Statistics(5, 3)
    rows = np.arange(count)
    whole.add(labels, replace(active(np.zeros((1, 1), np.float32)), rows=rows, features=features, values=values))
    whole.settle()
    cut = data.draw(st.integers(0, count))
    total = Statistics(5, 3)
    for part in (slice(cut, None), slice(0, cut)):
        some = Statistics(5, 3)
        held = rows[part] - (part.start or 0)
        some.add(labels[part], replace(active(np.zeros((1, 1), np.float32)), rows=held, features=features[part],
                                       values=values[part]))  # fmt: skip
        total.merge(some.tensors())
    assert total.sketch.keys.tolist() == whole.sketch.keys.tolist()
    assert total.sketch.counts.tolist() == whole.sketch.counts.tolist()
    assert total.fired.tolist() == whole.fired.tolist()
    np.testing.assert_allclose(total.total, whole.total, rtol=1e-12)
    expected = [[sum(1 for i in rows if features[i] == f and c in labels[i]) for c in range(3)] for f in range(5)]
    assert whole.fired.tolist() == expected


def test_memory_stays_within_the_limit_and_the_error_is_told() -> None:
    drawn = draw(4000, seed=6)
    statistics = Statistics(FEATURES, LABELS, limit=30000)
    for first in range(0, 4000, 500):
        part = slice(first, first + 500)
        statistics.add([(int(c),) for c in drawn.labels[part]], active(drawn.values[part]))
        statistics.settle()
    sketch = statistics.sketch
    assert sketch.keys.size <= 30000
    assert sketch.error > 2**-8, "bins became wider"
    assert sketch.counts.sum() == (drawn.values > 0).sum(), "and nothing was lost"
    [coarse] = blocks(statistics, [1000] * 4, USUAL, np.arange(FEATURES))
    for feature in (0, FIRING):
        width, density = literal(drawn.values[:, feature], drawn.labels)
        assert coarse.width[feature] == pytest.approx(width, rel=sketch.error)
        assert np.abs(coarse.density[feature] - density).sum(axis=1).max() < 0.08
    small = Statistics(FEATURES, LABELS, limit=5000)
    small.add([(int(c),) for c in drawn.labels], active(drawn.values))
    with pytest.raises(DataError, match="fewer labels"):
        small.settle()
