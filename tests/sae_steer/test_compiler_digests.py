"""Equal meanings have equal digests, and different ones different digests."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.sae import open_sae
from sae_steer.schema import parse_profile
from tests.sae_files import write_saelens
from tests.sae_steer.compiled_documents import FLAG, GOOD, READ, compilable, digest, profiled_catalog
from tests.sae_steer.helpers import (
    Json,
    compile_doc,
    documents,
    edit,
    program,
    reversed_keys,
    steering,
    vector_edit,
)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return profiled_catalog(tmp_path_factory.mktemp("catalog"))


def _floats(value: Any) -> Any:
    """The same JSON value with every integral ``value``, ``lo``, ... as a float."""
    if isinstance(value, dict):
        return {
            key: _as_float(child) if key in {"value", "lo", "hi", "above", "below", "limit"} else _floats(child)
            for key, child in value.items()
        }
    return [_floats(item) for item in value] if isinstance(value, list) else value


def _as_float(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, list) else float(value)


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "twin" if k == "sae" and child == "r1" else _renamed(child) for k, child in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=80)
@given(documents(**GOOD))
def test_spelling_does_not_change_the_digest(catalog: Catalog, document: Json) -> None:
    document, compiled = compilable(document, catalog)
    for same in (reversed_keys(document), _floats(document), _renamed(document)):
        assert digest(same, catalog) == compiled.digest
    assert hash(compiled) == hash(compile_doc(document, catalog))


@settings(max_examples=40)
@given(documents(**GOOD))
def test_a_profile_means_what_its_interventions_mean(catalog: Catalog, document: Json) -> None:
    document, compiled = compilable(document, catalog)
    catalog.put_profile(parse_profile({"name": "same", "interventions": document["interventions"]}))
    moved = {key: value for key, value in document.items() if key != "interventions"} | {"profiles": ["same"]}
    assert digest(moved, catalog) == compiled.digest


ZEROS: dict[str, Json] = {
    "clamp": edit(value=0.0),
    "add": edit(op="add", value=0.0),
    "floor": edit(op="floor", value=0.0),
    "cap": edit(op="cap", value=[0.0]),
    "scale": edit(op="scale", value=0.0),
    "gain": edit(op="gain", value=[0.0]),
    "lo": edit(op="mask_range", value=None, lo=0.0, hi=1.0),
    "hi": edit(op="mask_range", value=None, lo=-1.0, hi=0.0),
    "above": edit(when={"sae": "r1", "feature": 3, "above": 0.0}),
    "below": edit(when={"sae": "r1", "feature": 3, "below": 0.0}),
    "maximum": edit(value=0.0, units="reference_max"),
    "vector": vector_edit(value=0.0),
    "vector scale": vector_edit(op="scale", value=0.0),
}


def _negative_zero(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _negative_zero(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_negative_zero(item) for item in value]
    return -0.0 if value == 0.0 and isinstance(value, float) else value


@pytest.mark.parametrize("case", ZEROS)
def test_zero_has_no_sign(case: str, catalog: Catalog) -> None:
    document = steering(ZEROS[case])
    assert digest(_negative_zero(document), catalog) == digest(document, catalog)


def test_an_edit_that_was_overridden_leaves_nothing_behind(catalog: Catalog) -> None:
    overridden = program(edit(positions="completion"), catalog=catalog, profiles=["prompted"], override=True)
    plain = program(edit(positions="completion"), catalog=catalog)
    assert overridden.selectors == plain.selectors
    assert overridden.digest == plain.digest


GATE: Json = {"sae": "r1", "feature": 9, "above": 1.0}
DIFFERENT: dict[str, Json] = {
    "base": steering(edit()),
    "feature": steering(edit(features=[4])),
    "two features": steering(edit(features=[3, 4])),
    "sae": steering(edit(sae="r1b")),
    "site": steering(edit(sae="r0")),
    "value": steering(edit(value=2.0000000000000004)),
    "add": steering(edit(op="add")),
    "floor": steering(edit(op="floor")),
    "cap": steering(edit(op="cap")),
    "scale": steering(edit(op="scale")),
    "norm": steering(edit(units="residual_norm")),
    "maximum": steering(edit(units="reference_max")),
    "mask": steering(edit(op="mask_range", value=None, lo=1, hi=2)),
    "mask lo": steering(edit(op="mask_range", value=None, lo=0, hi=2)),
    "mask hi": steering(edit(op="mask_range", value=None, lo=1, hi=3)),
    "prompt": steering(edit(positions="prompt")),
    "completion": steering(edit(positions="completion")),
    "range": steering(edit(positions={"ranges": [[0, 4]]})),
    "other range": steering(edit(positions={"ranges": [[0, 5]]})),
    "skip": steering(edit(skip_bos=True)),
    "gate": steering(edit(when=GATE)),
    "gate feature": steering(edit(when=GATE | {"feature": 8})),
    "gate sae": steering(edit(when=GATE | {"sae": "r1b"})),
    "gate above": steering(edit(when=GATE | {"above": 1.5})),
    "gate below": steering(edit(when=GATE | {"below": 4.0})),
    "tokens": steering(edit(when={"token_in": [1]})),
    "other tokens": steering(edit(when={"token_in": [2]})),
    "gate and tokens": steering(edit(when=GATE | {"token_in": [1]})),
    "vector": steering(vector_edit()),
    "other vector": steering(vector_edit(vector="u")),
    "vector's site": steering(vector_edit(site="resid_mid.1")),
    "vector's value": steering(vector_edit(value=2.5)),
    "projection": steering(vector_edit(op="clamp")),
    "dose": steering(edit(), dose={"limit": 0.5}),
    "dose limit": steering(edit(), dose={"limit": 0.6}),
    "dose action": steering(edit(), dose={"limit": 0.5, "on_dose": "scale"}),
    "whole": steering(edit(sae="w1")),
    "drop": steering(edit(sae="w1"), error="drop"),
    "read": steering(edit(), readings=READ),
    "read alone": {"readings": READ},
    "read another": {"readings": READ | {"features": [4]}},
    "read in another order": {"readings": READ | {"features": [9, 3]}},
    "read after": {"readings": READ | {"at": "after"}},
    "read the prompt": {"readings": READ | {"positions": "prompt"}},
    "read in all": {"readings": READ | {"per_token": False}},
    "read twice": {"readings": [READ, READ]},
    "read the largest": {"readings": {"sae": "w1", "top_k": 2}},
    "trigger": {"on": [FLAG]},
    "trigger above": {"on": [FLAG | {"above": 2.0}]},
    "trigger feature": {"on": [FLAG | {"feature": 4}]},
}


def test_different_meanings_have_different_digests(catalog: Catalog) -> None:
    digests = {case: digest(document, catalog) for case, document in DIFFERENT.items()}
    assert len(set(digests.values())) == len(digests)


def test_another_file_under_the_same_name_is_another_program(tmp_path: Path) -> None:
    digests = set()
    for seed in (1, 2):
        write_saelens(tmp_path / str(seed), hook_name="blocks.1.hook_resid_post", seed=seed)
        digests.add(digest(steering(edit()), Catalog([CatalogSae.make("r1", open_sae(tmp_path / str(seed)))])))
    assert len(digests) == 2
