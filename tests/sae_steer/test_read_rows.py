"""The numbers of a token that is read: from the rows that anybody reads alone, the same as from all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.capabilities import Capabilities
from sae_steer.catalog import Catalog
from sae_steer.program import Program
from sae_steer.read_rows import Floats, ReadAt, needed_rows, read_rows, whole_reads
from tests.sae_steer.helpers import FEATURES, Json, compile_doc, edit, make_catalog

ANYTHING = Capabilities("toy", ())


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"), profiles=False)


features = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
readings = st.builds(
    lambda sae, named, top_k, at: {"sae": sae, "features": named, "top_k": top_k if sae == "w1" else 0, "at": at},
    st.sampled_from(["r0", "r1", "w1"]), features, st.integers(0, 4), st.sampled_from(["before", "after"]),
)  # fmt: skip
triggers = st.builds(
    lambda sae, feature: {"sae": sae, "feature": feature, "above": 1.0, "action": "flag"},
    st.sampled_from(["r1", "w1"]), st.integers(0, 9),
)  # fmt: skip
edits = st.dictionaries(st.sampled_from(["r0", "r1", "w1"]), features, max_size=3)


@st.composite
def documents(draw: st.DrawFn) -> Json:
    """Edits at up to two sites, and readings and triggers of the same and of other features."""
    return {
        "interventions": [edit(sae=sae, features=named) for sae, named in draw(edits).items()],
        "readings": draw(st.lists(readings, min_size=1, max_size=3)),
        "on": draw(st.lists(triggers, max_size=2)),
    }


def numbers_for(program: Program, count: int, seed: int) -> tuple[dict[ReadAt, Floats], Any]:
    """f, f' ``[n, K]`` of every site, and the largest of each dictionary that is asked; all of them differ."""
    random = np.random.default_rng(seed)
    activations = {
        (part.site, after): random.random((count, len(part.rows))) + 1 + after
        for part in program.sites
        for after in (False, True)
    }
    tops = {}
    for key, (k, _) in whole_reads(program).items():
        ids = np.array([random.permutation(FEATURES)[:k] for _ in range(count)], dtype=np.float64)
        tops[key] = ids, -np.sort(-random.random((count, min(k, FEATURES))) - 1)
    return activations, tops


def compact(activations: Mapping[ReadAt, Floats], places: Mapping[ReadAt, Sequence[int]]) -> dict[ReadAt, Floats]:
    """The columns of some rows alone; those of rows that the program does not have are another's."""

    def pick(values: Floats, rows: Sequence[int]) -> Floats:
        padded = np.concatenate([values, np.full((len(values), 40), np.nan)], axis=1)
        return np.asarray(padded[:, list(rows)])

    return {place: pick(activations[place], rows) for place, rows in places.items()}


@settings(max_examples=80)
@given(
    document=documents(),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
    others=st.lists(st.integers(0, 12), max_size=6),
)
def test_the_rows_that_are_read_are_enough(
    catalog: Catalog, document: Json, count: int, seed: int, others: list[int]
) -> None:
    """Beside rows that others in the same bucket read, which may be more than the program has."""
    program = compile_doc(document, catalog, capabilities=ANYTHING)
    assert program is not None
    activations, tops = numbers_for(program, count, seed)
    places = {place: sorted({*rows, *others}) for place, rows in needed_rows(program).items()}
    whole = read_rows(program, count, activations, tops)
    assert np.array_equal(read_rows(program, count, compact(activations, places), tops, places), whole)


def asked(catalog: Catalog) -> Program:
    document = {
        "interventions": [edit(sae="w1", features=[2, 7]), edit(features=[5])],
        "readings": [{"sae": "w1", "features": [9], "top_k": 3, "at": "after"}, {"sae": "r0", "features": [4, 1]}],
        "on": [{"sae": "r1", "feature": 8, "above": 0.0, "action": "flag"}],
    }
    program = compile_doc(document, catalog, capabilities=ANYTHING)
    assert program is not None
    return program


def test_which_rows_are_needed(catalog: Catalog) -> None:
    """Those that are named, those of triggers, and after the edits those that may have left the largest."""
    program = asked(catalog)
    rows_of = {part.site: part.rows for part in program.sites}
    named = {
        (site, after): {(rows_of[site][i].source, rows_of[site][i].feature) for i in rows}
        for (site, after), rows in needed_rows(program).items()
    }
    source = {name: catalog.sae(name).sae.fingerprint for name in ("w1", "r1", "r0")}
    at = {name: catalog.sae(name).site for name in ("w1", "r0")}
    assert named == {
        (at["w1"], True): {(source["w1"], 2), (source["w1"], 7), (source["w1"], 9)},
        (at["w1"], False): {(source["r1"], 8)},
        (at["r0"], False): {(source["r0"], 4), (source["r0"], 1)},
    }


@pytest.mark.parametrize(("after", "without"), [(True, 0), (True, 1), (True, 2), (False, 0)])
def test_a_row_too_few_is_seen(catalog: Catalog, after: bool, without: int) -> None:
    program = asked(catalog)
    activations, tops = numbers_for(program, 2, 0)
    places = needed_rows(program)
    del places[catalog.sae("w1").site, after][without]
    with pytest.raises(KeyError):
        read_rows(program, 2, compact(activations, places), tops, places)


def test_columns_in_another_order_are_seen(catalog: Catalog) -> None:
    program = asked(catalog)
    activations, tops = numbers_for(program, 2, 0)
    places = needed_rows(program)
    wrong = {place: rows[::-1] for place, rows in places.items()}
    whole = read_rows(program, 2, activations, tops)
    assert not np.array_equal(read_rows(program, 2, compact(activations, places), tops, wrong), whole)


def test_activations_of_the_other_side_of_the_edits_are_seen(catalog: Catalog) -> None:
    program = asked(catalog)
    activations, tops = numbers_for(program, 2, 0)
    whole = read_rows(program, 2, activations, tops)
    swapped = {(site, not after): values for (site, after), values in activations.items()}
    assert not np.array_equal(read_rows(program, 2, swapped, tops), whole)
