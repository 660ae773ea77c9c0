"""What a calibration means in a request: `app` against Bayes in float64, its rivals, and how they combine."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import DuplicateEdit
from sae_steer.program import Row
from sae_steer.reference_app import gain_of
from sae_steer.sae import open_sae
from sae_steer_kernels.feature_edit.reference import gain_at
from tests.calibrations import made_up, write_calibration
from tests.sae_files import write_saelens
from tests.sae_steer.calibrated_edits import app, refused, rival, rows, stored
from tests.sae_steer.helpers import CONCEPTS, MODEL, Json, edit, make_catalog, program

HERE = "steering.interventions[0]"
NEXT = "steering.interventions[1]"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.fixture
def own(tmp_path: Path) -> Catalog:
    """A catalog whose files a test may spoil."""
    return make_catalog(tmp_path)


# ------------------------------------------------------------------------------------------- against the definition

PRIORS = ("uniform", "target", "empirical")
Gain = Callable[[Row, float], float]


def served(row: Row, f: float) -> float:
    """The gain that a row's table gives, by the kernels' own definition."""
    assert row.gain is not None
    table = torch.from_numpy(row.gain.values().copy())
    return gain_at(f, torch.stack([table, table]), row.gain.width_pos, 0.0)


def largest_fault(catalog: Catalog, gain: Gain) -> float:
    """The largest difference from Bayes over a grid that has bin centres, bin edges and what is beyond the last."""
    found = 0.0
    for prior in PRIORS:
        for row in rows(catalog, app(prior=prior)):
            assert row.gain is not None
            for place in (0.0, 0.01, 0.25, 0.5, 1.0, 1.25, 3.5, 3.75, 7.5, 7.9, 40.0):
                f = place * row.gain.width_pos
                found = max(found, abs(gain(row, f) - gain_of(stored(catalog), row.feature, f, ("rude",), prior)))
    return found


def test_a_table_is_bayes(catalog: Catalog) -> None:
    assert largest_fault(catalog, served) < 1e-6


def test_a_table_that_is_interpolated_across_the_atom_is_seen(catalog: Catalog) -> None:
    def across(row: Row, f: float) -> float:
        assert row.gain is not None
        place = f / row.gain.width_pos
        return 1 + place / 0.5 * (served(row, f) - 1) if 0 < place < 0.5 else served(row, f)

    assert largest_fault(catalog, across) > 0.05


def test_a_table_without_the_firing_rates_is_seen(own: Catalog) -> None:
    """Densities of what fires, given that it fires: the atom's mass is lost."""
    folder = own.profiles.folder
    assert folder is not None
    record = stored(own).record
    positive = record.log_density[:, :, 1:]
    conditional = torch.cat([torch.full_like(positive[..., :1], -40.0), positive - positive.logsumexp(2, True)], dim=2)
    write_calibration(
        folder, "cal2", own.sae("r1"), replace(record, log_density=conditional), labels=CONCEPTS, model=MODEL
    )
    without = {row.feature: row for row in rows(own, app(calibration="cal2"))}
    assert largest_fault(own, lambda row, f: served(without[row.feature], f)) > 0.05


@settings(max_examples=60)
@given(
    concepts=st.lists(st.sampled_from(CONCEPTS), min_size=1, max_size=2, unique=True),
    prior=st.sampled_from(PRIORS),
    place=st.floats(-1, 12),
    top=st.none() | st.integers(1, 4),
)
def test_any_concepts_at_any_activation(
    catalog: Catalog, concepts: list[str], prior: str, place: float, top: int | None
) -> None:
    more = {"top": top} if top is not None else {}
    found = rows(catalog, *(app(concept, prior=prior, **more) for concept in concepts))
    calibration = stored(catalog)
    chosen = {
        feature
        for concept in concepts
        for feature in calibration.record.features[calibration.record.chosen(CONCEPTS.index(concept))[:top]].tolist()
    }
    assert {row.feature for row in found} == chosen
    for row in found:
        assert row.gain is not None
        f = place * row.gain.width_pos
        expected = gain_of(calibration, row.feature, f, concepts, prior)
        have = served(row, f) if f > 0 else 1.0
        assert have == pytest.approx(expected, abs=1e-6)


def test_bayes_by_hand(tmp_path: Path) -> None:
    """Two bins, three concepts with 100, 200 and 300 documents."""
    density = torch.tensor([[[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.9, 0.1, 0.0001]]])
    density = density / density.sum(dim=2, keepdim=True)
    record = replace(
        made_up([4], 3, bins=2),
        width=torch.tensor([2.0]),
        log_density=density.log(),
        fired=torch.ones(1, 3, dtype=torch.int64),
    )
    write_saelens(tmp_path / "sae", hook_name="blocks.1.hook_resid_post", d_in=16, n_features=32, seed=1)
    entry = CatalogSae.make("r1", open_sae(tmp_path / "sae"))
    write_calibration(tmp_path / "profiles", "cal", entry, record, labels=CONCEPTS, model=MODEL)
    catalog = Catalog([entry], [], tmp_path / "profiles", model=MODEL)

    def first_bin(*edits: Json) -> float:
        [row] = rows(catalog, *edits)
        assert row.gain is not None
        assert (row.feature, row.gain.width_pos) == (4, 2.0)
        return float(row.gain.values()[0])

    a, b, c = density[0, :, 1].tolist()
    assert first_bin(app()) == pytest.approx(1 - a / (a + b + c))
    assert first_bin(app(prior="target")) == pytest.approx(1 - 0.5 * a / (0.5 * a + 0.25 * b + 0.25 * c))
    assert first_bin(app(prior="empirical")) == pytest.approx(1 - 1 * a / (1 * a + 2 * b + 3 * c))
    assert first_bin(app("sad"), app()) == pytest.approx(1 - (a + b) / (a + b + c))
    both = app("sad", prior="target"), app(prior="target")
    assert first_bin(*both) == pytest.approx(1 - 0.25 * (a + b) / (0.25 * (a + b) + 0.5 * c))
    assert first_bin(app("sad"), app(), app("calm")) == pytest.approx(0.0, abs=1e-7)


def test_strength_is_the_exponent(catalog: Catalog) -> None:
    assert {row.gamma for row in rows(catalog, app(strength=2.5))} == {2.5}
    assert {row.gamma for row in rows(catalog, app())} == {1.0}


def test_a_feature_that_never_fired_is_left_alone(catalog: Catalog) -> None:
    first = int(stored(catalog).record.features[0])
    everything = rows(catalog, *(app(concept) for concept in CONCEPTS))
    [row] = [row for row in everything if row.feature == first]
    assert row.gain is not None
    assert set(row.gain.values().tolist()) == {1.0}
    others = [each for each in everything if each.feature != first]
    assert all(each.gain is not None and set(each.gain.values().tolist()) == {0.0} for each in others)


# ------------------------------------------------------------------------------------------- rivals


def _of(catalog: Catalog, concept: str) -> list[tuple[int, int]]:
    """Places in the record and numbers of the features that were chosen for a concept."""
    record = stored(catalog).record
    return [(int(place), int(record.features[place])) for place in record.chosen(CONCEPTS.index(concept)).sort().values]


def test_ablation_is_a_full_mask(catalog: Catalog) -> None:
    features = [feature for _, feature in _of(catalog, "rude")]
    by_hand = program(edit(op="ablate", value=None, features=features), catalog=catalog)
    assert program(rival("ablate"), catalog=catalog).digest == by_hand.digest


def test_gain_is_aura(catalog: Catalog) -> None:
    auroc = stored(catalog).record.auroc[:, 0].tolist()
    places = _of(catalog, "rude")
    values = [1 - 2 * (auroc[place] - 0.5) if auroc[place] > 0.5 else 1.0 for place, _ in places]
    assert min(values) < 1.0
    assert max(values) == 1.0
    by_hand = program(edit(op="gain", value=values, features=[f for _, f in places]), catalog=catalog)
    assert program(rival("gain"), catalog=catalog).digest == by_hand.digest


def test_gain_with_a_value_is_dampening(catalog: Catalog) -> None:
    features = [feature for _, feature in _of(catalog, "rude")]
    by_hand = program(edit(op="gain", value=0.5, features=features), catalog=catalog)
    assert program(rival("gain", value=0.5), catalog=catalog).digest == by_hand.digest


@pytest.mark.parametrize("sigmas", [None, 0.0, 1.5])
def test_a_range_is_the_concepts_mean_and_deviation(catalog: Catalog, sigmas: float | None) -> None:
    record = stored(catalog).record
    found = rows(catalog, rival("mask_range") if sigmas is None else rival("mask_range", sigmas=sigmas))
    for row, (place, feature) in zip(found, _of(catalog, "rude"), strict=True):
        mean, std = float(record.mean[place, 0]), float(record.std[place, 0])
        width = (2.0 if sigmas is None else sigmas) * std
        assert (row.feature, row.op, row.scale) == (feature, "mask_range", 1.0)
        if int(record.fired[place, 0]):
            assert (row.mask_lo, row.mask_hi) == pytest.approx((mean - width, mean + width))
        else:
            assert (row.mask_lo, row.mask_hi) == (math.inf, -math.inf)


def test_what_never_fired_for_a_concept_masks_nothing(catalog: Catalog) -> None:
    silent = [f for place, f in _of(catalog, "rude") if not int(stored(catalog).record.fired[place, 0])]
    assert silent, "the made-up record has one"


@pytest.mark.parametrize("op", ["app", "ablate", "gain", "mask_range"])
def test_top_takes_the_best(catalog: Catalog, op: str) -> None:
    record = stored(catalog).record
    best = record.features[record.chosen(0)[:2]].tolist()
    assert [row.feature for row in rows(catalog, rival(op, top=2))] == sorted(best)


# ------------------------------------------------------------------------------------------- together


def test_the_order_of_concepts_makes_no_difference(catalog: Catalog) -> None:
    one = program(app(), app("sad"), app("calm", top=2), catalog=catalog)
    other = program(app("calm", top=2), app("sad"), app(), catalog=catalog)
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", 2.0), ("prior", "target"), ("positions", "prompt"), ("skip_bos", True), ("when", {"token_in": [3]})],
)
def test_concepts_of_one_calibration_must_agree(catalog: Catalog, field: str, value: object) -> None:
    error = refused(catalog, app(), app("sad", **{field: value}))
    assert (error.code, error.param) == ("duplicate_edit", f"{NEXT}.{field}")
    program(app(**{field: value}), app("sad", **{field: value}), catalog=catalog)


def test_one_concept_twice_is_refused(catalog: Catalog) -> None:
    error = refused(catalog, app(), app("sad"), app())
    assert (error.code, error.param) == ("duplicate_edit", "steering.interventions[2].concept")


def test_two_calibrations_and_other_edits_of_one_feature_are_refused(catalog: Catalog) -> None:
    for other in (
        app("sad", calibration="cal2"),
        rival("ablate"),
        rival("mask_range", concept="sad"),
        edit(features=[7]),
    ):
        with pytest.raises(DuplicateEdit):
            program(*(app(concept) for concept in CONCEPTS), other, catalog=catalog)


def test_a_profile_and_a_request_combine_or_override(catalog: Catalog) -> None:
    """The profile's own edit is `app` of "rude"."""
    combined = program(app("sad"), catalog=catalog, profiles=["cal"])
    assert combined.digest == program(app(), app("sad"), catalog=catalog).digest
    assert refused(catalog, app(strength=2.0), profiles=["cal"]).param == f"{HERE}.concept"
    stronger = program(app(strength=2.0), catalog=catalog, profiles=["cal"], override=True)
    assert stronger.digest == program(app(strength=2.0), catalog=catalog).digest
    fewer = rows(catalog, app(strength=2.0, top=2), profiles=["cal"], override=True)
    assert sorted({row.gamma for row in fewer}) == [1.0, 2.0]
    assert len(fewer) == len(rows(catalog, app()))


# ------------------------------------------------------------------------------------------- content


def test_a_program_goes_by_content(own: Catalog) -> None:
    folder = own.profiles.folder
    assert folder is not None
    before = program(app(), catalog=own)
    record = stored(own).record
    write_calibration(folder, "copy", own.sae("r1"), record, labels=CONCEPTS, model=MODEL)
    assert program(app(calibration="copy"), catalog=own).digest == before.digest
    other = replace(record, width=record.width * 2)
    write_calibration(folder, "cal", own.sae("r1"), other, labels=CONCEPTS, model=MODEL)
    after = program(app(), catalog=own)
    assert after.digest != before.digest
    assert program(app(calibration="copy"), catalog=own).digest == before.digest


def test_a_calibration_is_read_once(catalog: Catalog) -> None:
    assert stored(catalog) is stored(catalog)


def test_two_servers_with_one_folder_agree(own: Catalog) -> None:
    again = Catalog(own.saes.values(), own.vectors.values(), own.profiles.folder, model=MODEL)
    assert program(app(), catalog=own).digest == program(app(), catalog=again).digest
