"""The compiler refuses what cannot be honoured exactly, by code and path, and compiles the rest."""

import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.compiler import MAX_SELECTORS
from sae_steer.errors import RequestError
from sae_steer.limits import Limits
from sae_steer.program import Phase
from sae_steer.sae import open_sae
from sae_steer.sites import Site
from tests.sae_files import write_saelens
from tests.sae_steer.compiled_documents import profiled_catalog, without_later
from tests.sae_steer.helpers import (
    BOS,
    FEATURES,
    SITES,
    Json,
    compile_doc,
    documents,
    edit,
    make_catalog,
    program,
    refused_doc,
    steering,
    vector_edit,
)

HERE = "steering.interventions[0]"
NEXT = "steering.interventions[1]"
APP: Json = {"op": "app", "sae": "r1", "calibration": "c", "concept": "rude"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return profiled_catalog(tmp_path_factory.mktemp("catalog"))


# ------------------------------------------------------------------------------------------- refusals

REFUSALS: dict[str, tuple[Json, str, str]] = {
    # names
    "unknown sae": (steering(edit(sae="none")), "unknown_sae", f"{HERE}.sae"),
    "unknown feature": (steering(edit(features=[0, FEATURES])), "unknown_feature", f"{HERE}.features[1]"),
    "unknown profile": ({"profiles": ["calm", "none"]}, "unknown_profile", "steering.profiles[1]"),
    "unknown vector": (steering(vector_edit(vector="none")), "unknown_vector", f"{HERE}.vector"),
    "sae for a vector": (steering(vector_edit(vector="r1")), "unknown_vector", f"{HERE}.vector"),
    "site that does not parse": (steering(vector_edit(site="nowhere")), "unknown_site", f"{HERE}.site"),
    "site not hooked": (steering(vector_edit(site="resid_post.2")), "unknown_site", f"{HERE}.site"),
    "site of two places": (steering(vector_edit(site="mlp_in.2->mlp_out.2")), "unknown_site", f"{HERE}.site"),
    "second intervention": (steering(edit(), edit(sae="none")), "unknown_sae", f"{NEXT}.sae"),
    # once per program
    "feature twice": (steering(edit(features=[3, 4, 3])), "duplicate_edit", f"{HERE}.features"),
    "feature in two": (steering(edit(), edit(op="ablate", value=None)), "duplicate_edit", NEXT),
    "same file, other name": (steering(edit(), edit(sae="twin")), "duplicate_edit", NEXT),
    "other positions": (
        steering(edit(positions="prompt"), edit(positions="completion")),
        "duplicate_edit",
        NEXT,
    ),
    "vector twice": (steering(vector_edit(), vector_edit(op="ablate", value=None)), "duplicate_edit", NEXT),
    "profile and request": (steering(edit(), profiles=["calm"]), "duplicate_edit", HERE),
    "override is for profiles": (steering(edit(), edit(), override=True), "duplicate_edit", NEXT),
    "override once": (steering(edit(), edit(), override=True, profiles=["calm"]), "duplicate_edit", NEXT),
    "two profiles": ({"profiles": ["calm", "also"]}, "duplicate_edit", "steering.profiles[1].interventions[0]"),
    "two profiles, override": (
        {"profiles": ["calm", "also"], "override": True},
        "duplicate_edit",
        "steering.profiles[1].interventions[0]",
    ),
    "profile twice": ({"profiles": ["calm", "calm"]}, "duplicate_edit", "steering.profiles[1]"),
    # values
    "too few values": (steering(edit(features=[1, 2], value=[1.0])), "wrong_length", f"{HERE}.value"),
    "too many values": (steering(edit(op="scale", value=[1.0, 2.0])), "wrong_length", f"{HERE}.value"),
    "no maximum": (steering(edit(features=[5], units="reference_max")), "no_reference_max", f"{HERE}.units"),
    "no label": (steering(edit(features=[6], units="reference_max")), "no_reference_max", f"{HERE}.units"),
    "too much": (steering(edit(value=1e12, units="reference_max")), "out_of_range", f"{HERE}.value"),
    "no labels": (steering(edit(sae="r0", units="reference_max")), "no_reference_max", f"{HERE}.units"),
    # gates
    "gate's sae": (steering(edit(when={"sae": "x", "feature": 1, "above": 0})), "unknown_sae", f"{HERE}.when.sae"),
    "gate's feature": (
        steering(edit(when={"sae": "r1", "feature": FEATURES, "above": 0})),
        "unknown_feature",
        f"{HERE}.when.feature",
    ),
    "gate elsewhere": (
        steering(edit(when={"sae": "r0", "feature": 1, "above": 0})),
        "unsupported",
        f"{HERE}.when.sae",
    ),
    "gate by topk": (
        steering(edit(when={"sae": "tk", "feature": 1, "above": 0})),
        "unsupported",
        f"{HERE}.when.sae",
    ),
    "topk": (steering(edit(sae="tk")), "unsupported", f"{HERE}.sae"),
    # the reconstruction error
    "drop with two": (steering(edit(sae="w1"), edit(sae="tkw"), error="drop"), "unsupported", "steering.error"),
    "drop with a gate of another": (
        steering(edit(sae="w1", when={"sae": "tkw", "feature": 1, "above": 0}), error="drop"),
        "unsupported",
        "steering.error",
    ),
    "drop with a vector": (steering(edit(sae="w1"), vector_edit(), error="drop"), "unsupported", "steering.error"),
    "drop of a vector": (steering(vector_edit(), error="drop"), "unsupported", "steering.error"),
    "drop of a part": (steering(edit(sae="r1b"), error="drop"), "unsupported", "steering.error"),
    "drop, one site not whole": (
        steering(edit(sae="w1"), edit(sae="r0"), error="drop"),
        "unsupported",
        "steering.error",
    ),
    "calibration": (steering(APP), "unknown_calibration", f"{HERE}.calibration"),
    # later
    "stop": (
        {"on": [{"sae": "r1", "feature": 1, "above": 1, "action": "stop"}]},
        "unsupported",
        "steering.on[0].action",
    ),
    # readings and triggers
    "read of an unknown sae": ({"readings": {"sae": "none", "features": [1]}}, "unknown_sae", "steering.readings.sae"),
    "read of an unknown feature": (
        {"readings": [{"sae": "r1", "features": [1]}, {"sae": "r1", "features": [2, FEATURES]}]},
        "unknown_feature",
        "steering.readings[1].features[1]",
    ),
    "read of a topk": ({"readings": {"sae": "tk", "features": [1]}}, "unsupported", "steering.readings.sae"),
    "top_k of a part": ({"readings": {"sae": "r1b", "top_k": 1}}, "unsupported", "steering.readings.top_k"),
    "top_k beyond the dictionary": (
        {"readings": {"sae": "w1", "top_k": FEATURES + 1}},
        "out_of_range",
        "steering.readings.top_k",
    ),
    "trigger of an unknown sae": (
        {"on": [{"sae": "none", "feature": 1, "above": 1, "action": "flag"}]},
        "unknown_sae",
        "steering.on[0].sae",
    ),
    "trigger of an unknown feature": (
        {"on": [{"sae": "r1", "feature": FEATURES, "above": 1, "action": "flag"}]},
        "unknown_feature",
        "steering.on[0].feature",
    ),
    # profiles of another time
    "fingerprint": ({"profiles": ["stale"]}, "fingerprint_mismatch", "steering.profiles[0]"),
    "profile's sae is gone": ({"profiles": ["lost"]}, "unknown_sae", "steering.profiles[0]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, catalog: Catalog) -> None:
    document, code, param = REFUSALS[case]
    error = refused_doc(document, catalog)
    assert (error.code, error.param, error.status) == (code, param, 400)


def test_skip_bos_needs_a_bos(catalog: Catalog) -> None:
    document = steering(edit(skip_bos=True))
    error = refused_doc(document, catalog, bos=None)
    assert (error.code, error.param) == ("unsupported", f"{HERE}.skip_bos")
    assert program(edit(skip_bos=True), catalog=catalog).selectors[0].skip_token == BOS


@pytest.mark.parametrize("whole", ["tkw", "w1"])
def test_whole_dictionaries_may_be_dropped_and_ranked(whole: str, catalog: Catalog) -> None:
    compiled = program(edit(sae=whole), catalog=catalog, error="drop")
    assert compiled.sites[0].drop == catalog.sae(whole).sae.fingerprint
    assert program(edit(sae=whole), catalog=catalog).sites[0].drop is None


@pytest.mark.parametrize("order", ["whole last", "whole first"])
def test_a_file_that_is_whole_at_one_site_is_not_whole_at_another(order: str, tmp_path: Path) -> None:
    write_saelens(tmp_path, d_in=16, hook_name="blocks.1.hook_resid_post")
    sae, there = open_sae(tmp_path), Site.parse("resid_post.0")
    entries = [CatalogSae.make("part", sae), CatalogSae.make("whole", sae, site=there, whole=True)]
    catalog = Catalog(entries if order == "whole last" else entries[::-1])
    sites = [Site.parse("resid_post.1"), there]
    assert refused_doc(steering(edit(sae="part"), error="drop"), catalog, sites=sites).param == "steering.error"
    compiled = compile_doc(steering(edit(sae="whole"), error="drop"), catalog, sites=sites)
    assert compiled is not None
    assert compiled.sites[0].drop is not None


@pytest.mark.parametrize(
    ("limits", "document", "fits"),
    [
        (Limits(max_edits=3), steering(edit(features=[1, 2]), edit(sae="r0", features=[1])), True),
        (Limits(max_edits=2), steering(edit(features=[1, 2]), edit(sae="r0", features=[1])), False),
        (Limits(rows=2, wide_programs=0), steering(edit(features=[1, 2])), True),
        (Limits(rows=1, wide_programs=0), steering(edit(features=[1, 2])), False),
        (Limits(rows=1, wide_programs=0, wide_rows=9), steering(edit(features=[1, 2])), False),
        (Limits(rows=1, wide_programs=1, wide_rows=2), steering(edit(features=[1, 2])), True),
        (Limits(rows=1, wide_programs=1, wide_rows=2), steering(edit(features=[1, 2, 3])), False),
        # A row that only gates takes room as well, but is not an edit.
        (Limits(rows=2, wide_programs=0), steering(edit(when={"sae": "r1", "feature": 9, "above": 0})), True),
        (Limits(rows=1, wide_programs=0), steering(edit(when={"sae": "r1", "feature": 9, "above": 0})), False),
        (Limits(max_edits=1), steering(edit(when={"sae": "r1", "feature": 9, "above": 0})), True),
    ],
)
def test_limits(limits: Limits, document: Json, fits: bool, catalog: Catalog) -> None:
    if fits:
        assert compile_doc(document, catalog, limits=limits) is not None
    else:
        error = refused_doc(document, catalog, limits=limits)
        assert (error.code, error.param) == ("limit_exceeded", "steering.interventions")


@pytest.mark.parametrize(
    ("asked", "held", "limit"), [(None, 0.5, 0.5), (0.4, 0.5, 0.4), (0.5, 0.5, 0.5), (0.4, math.inf, 0.4)]
)
def test_the_lower_of_two_dose_limits_holds(asked: float | None, held: float, limit: float, catalog: Catalog) -> None:
    fields = {"dose": {"limit": asked, "on_dose": "scale"}} if asked is not None else {}
    compiled = compile_doc(steering(edit(), **fields), catalog, limits=Limits(dose_limit=held))
    assert compiled is not None
    assert compiled.dose_limit == limit
    assert compiled.on_dose == ("scale" if asked is not None else "fail")


def test_dropping_the_error_of_a_skip_transcoder_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path / "sk", architecture="skip_transcoder")
    catalog = Catalog([CatalogSae.make("sk", open_sae(tmp_path / "sk"), whole=True)])
    error = refused_doc(steering(edit(sae="sk"), error="drop"), catalog, sites=(catalog.sae("sk").site,))
    assert (error.code, error.param) == ("unsupported", "steering.error")
    assert "W_skip" in error.message


def test_dropping_the_error_of_nothing_is_refused(catalog: Catalog) -> None:
    assert refused_doc({"error": "drop"}, catalog).param == "steering.error"


def test_the_order_of_what_is_asked_and_how_ranges_are_cut_make_no_difference(catalog: Catalog) -> None:
    one = edit(features=[2], positions={"ranges": [[0, 4], [4, 8]]}, when={"sae": "r1", "feature": 9, "above": 1})
    same = edit(features=[2], positions={"ranges": [[2, 8], [0, 3]]}, when={"sae": "r1", "feature": 9, "above": 1})
    two = edit(sae="r0", features=[5, 3], value=[1.0, 2.0])
    turned = edit(sae="r0", features=[3, 5], value=[2.0, 1.0])
    first, second = (compile_doc(steering(*edits), catalog) for edits in ((one, two), (turned, same)))
    assert first is not None
    assert first == second


def test_a_dose_beyond_the_servers_is_refused_rather_than_lowered(catalog: Catalog) -> None:
    document = steering(edit(), dose={"limit": 0.6, "on_dose": "scale"})
    error = refused_doc(document, catalog, limits=Limits(dose_limit=0.5))
    assert (error.code, error.param) == ("limit_exceeded", "steering.dose.limit")


def _selected(count: int) -> Json:
    return steering(*(edit(features=[i], positions={"ranges": [[i, i + 1]]}) for i in range(count)))


def test_as_many_selectors_as_a_token_has_bits(catalog: Catalog) -> None:
    limits = Limits(rows=MAX_SELECTORS + 1)
    compiled = compile_doc(_selected(MAX_SELECTORS), catalog, limits=limits)
    assert compiled is not None
    assert len(compiled.selectors) == MAX_SELECTORS
    error = refused_doc(_selected(MAX_SELECTORS + 1), catalog, limits=limits)
    assert (error.code, error.param) == ("limit_exceeded", "steering.interventions")


def test_a_gate_reads_the_place_that_the_edit_reads_and_its_rows_are_there(tmp_path: Path) -> None:
    """An SAE of the MLP's input reads what a transcoder reads, but its rows are in the tables of another site."""
    write_saelens(tmp_path / "in", hook_name="blocks.2.mlp.hook_in", seed=1)
    catalog = make_catalog(tmp_path / "rest")
    entry = CatalogSae.make("in", open_sae(tmp_path / "in"))
    catalog = Catalog([*catalog.saes.values(), entry])
    document = steering(edit(sae="tc", when={"sae": "in", "feature": 1, "above": 0}))
    error = refused_doc(document, catalog, sites=(*SITES, entry.site))
    assert (error.code, error.param) == ("unsupported", f"{HERE}.when.sae")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "other", "interventions": []}', '{"name": "odd"}'])
def test_a_broken_profile_is_refused_with_its_place(text: str, catalog: Catalog) -> None:
    folder = catalog.profiles.folder
    assert folder is not None
    (folder / "odd").mkdir()
    (folder / "odd" / "profile.json").write_text(text)
    try:
        assert refused_doc({"profiles": ["odd"]}, catalog).param == "steering.profiles[0]"
    finally:
        shutil.rmtree(folder / "odd")


def test_a_profile_that_goes_away_meanwhile_is_refused(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.profiles, "names", lambda: ["vanished"])
    assert refused_doc({"profiles": ["vanished"]}, catalog).code == "unknown_profile"


# ------------------------------------------------------------------------------------------- what is compiled


@pytest.mark.parametrize("document", [{}, steering(), {"dose": {"limit": 1.0}}, {"override": True}])
def test_nothing_asked_is_no_program(document: Json, catalog: Catalog) -> None:
    assert compile_doc(document, catalog) is None


def test_sites_come_in_the_order_of_the_model(catalog: Catalog) -> None:
    parts = [edit(sae="tc"), edit(), vector_edit(site="resid_mid.1"), edit(sae="r0"), vector_edit(vector="u")]
    compiled = program(*parts, catalog=catalog)
    order = ["resid_post.0", "resid_mid.1", "resid_post.1", "mlp_in.2->mlp_out.2"]
    assert [str(part.site) for part in compiled.sites] == order


def test_a_gate_shares_the_row_of_an_edited_feature(catalog: Catalog) -> None:
    gate = {"sae": "twin", "feature": 4, "above": 1.5}
    compiled = program(edit(features=[3], when=gate), edit(features=[4]), catalog=catalog)
    (part,) = compiled.sites
    assert [row.feature for row in part.rows] == [3, 4]
    assert part.rows[0].gate is not None
    assert (part.rows[0].gate.row, part.rows[0].gate.above, part.rows[0].gate.below) == (1, 1.5, math.inf)
    assert part.rows[1].gate is None


def test_a_feature_may_gate_itself_and_others_through_one_row(catalog: Catalog) -> None:
    gate = {"sae": "r1", "feature": 9, "below": 2.0}
    compiled = program(edit(features=[3, 4], when=gate), edit(sae="r1b", when=gate), catalog=catalog)
    (part,) = compiled.sites
    assert [(row.feature, row.selector) for row in part.rows] == [(3, 0), (4, 0), (3, 0), (9, -1)]
    assert [row.gate.row for row in part.rows[:3] if row.gate is not None] == [3, 3, 3]
    own = program(edit(features=[3], when={"sae": "r1", "feature": 3, "above": 0}), catalog=catalog)
    assert [row.gate.row for row in own.sites[0].rows if row.gate is not None] == [0]


def test_override_replaces_only_what_is_named(catalog: Catalog) -> None:
    compiled = program(edit(features=[3], value=9.0), catalog=catalog, profiles=["calm"], override=True)
    by_feature = {row.feature: (row.op, row.shift) for row in compiled.sites[0].rows}
    assert by_feature == {3: ("clamp", 9.0), 4: ("ablate", 0.0)}


def test_profiles_and_requests_add_up(catalog: Catalog) -> None:
    compiled = program(edit(features=[7]), catalog=catalog, profiles=["calm", "other"])
    assert {(row.source, row.feature) for row in compiled.sites[0].rows} == {
        (catalog.sae("r1").sae.fingerprint, 3),
        (catalog.sae("r1").sae.fingerprint, 4),
        (catalog.sae("r1").sae.fingerprint, 7),
        (catalog.sae("r1b").sae.fingerprint, 3),
    }


def test_reference_max_multiplies(catalog: Catalog) -> None:
    compiled = program(edit(features=[3, 4], value=[2.0, -1.0], units="reference_max"), catalog=catalog)
    assert [row.shift for row in compiled.sites[0].rows] == [10.0, -2.5]


def test_equal_selectors_are_one(catalog: Catalog) -> None:
    parts = [
        edit(features=[1], when={"token_in": [5, 3, 3]}, positions={"ranges": [[4, 6], [0, 2]]}),
        edit(features=[2], when={"token_in": [3, 5]}, positions={"ranges": [[0, 2], [4, 6], [0, 2]]}),
    ]
    (selector,) = program(*parts, catalog=catalog).selectors
    assert (selector.phase, selector.ranges, selector.token_in) == (Phase.RANGES, ((0, 2), (4, 6)), (3, 5))


POOLS: Json = {
    "saes": st.sampled_from(["r0", "r1", "r1b", "tk", "tkw", "w1", "tc", "none"]),
    "vectors": st.sampled_from(["v", "u", "none"]),
    "sites": st.sampled_from(["resid_post.1", "resid_mid.1", "nowhere", "z.0"]),
    "features": st.integers(0, FEATURES),
    "calibrations": st.sampled_from([("cal", "rude"), ("cal0", "calm"), ("cal", "none"), ("none", "sad")]),
}


@settings(max_examples=100)
@given(documents(**POOLS) | documents(**POOLS).map(without_later), st.sampled_from([None, BOS]))
def test_a_well_formed_document_compiles_or_is_refused_as_a_request(
    catalog: Catalog, document: Json, bos: int | None
) -> None:
    refusal: RequestError | None = None
    try:
        compiled = compile_doc(document, catalog, bos=bos)
        asks = document.get("interventions") or document.get("readings") is not None or document.get("on")
        assert (compiled is None) == (not asks)
    except RequestError as error:
        refusal = error
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.param is not None
        assert refusal.param.startswith("steering.")
