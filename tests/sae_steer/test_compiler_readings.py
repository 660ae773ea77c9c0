"""What is read: how much one request may have read, and that it changes no edit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer import read_compiler
from sae_steer.catalog import Catalog
from sae_steer.footprint import Footprint
from sae_steer.limits import Limits
from sae_steer.schema import MAX_READ_FEATURES
from tests.sae_steer.compiled_documents import FLAG, GOOD, READ, compilable, profiled_catalog
from tests.sae_steer.helpers import FEATURES, Json, compile_doc, documents, refused_doc


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return profiled_catalog(tmp_path_factory.mktemp("catalog"))


def test_one_request_has_so_many_features_read(catalog: Catalog) -> None:
    """Distinct readings of one feature count as many times as they are told; a slot holds it once."""
    assert MAX_READ_FEATURES == 1024
    many = {"readings": [{"sae": "r1", "features": list(range(FEATURES))}] * 8}
    assert compile_doc(many, catalog) is not None
    for most, code in ((8 * FEATURES, None), (8 * FEATURES - 1, "limit_exceeded")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_compiler, "MAX_READ_FEATURES", most)
            assert (refused_doc(many, catalog).code if code else compile_doc(many, catalog) and None) == code
    narrow = Limits(rows=4, wide_programs=0)
    error = refused_doc({"readings": {"sae": "r1", "features": [1, 2, 3, 4, 5]}}, catalog, limits=narrow)
    assert (error.code, error.param) == ("limit_exceeded", "steering.readings")


READ_ONLY: list[Json] = [
    {"readings": READ},
    {"on": [FLAG], "readings": [READ | {"positions": "prompt"}, {"sae": "w1", "top_k": 2}]},
    {"readings": {"sae": "r0", "features": [5, 3], "positions": {"ranges": [[1, 2]]}}},
]


@settings(max_examples=60)
@given(documents(**GOOD), st.sampled_from(READ_ONLY))
def test_what_is_read_changes_no_edit(catalog: Catalog, document: Json, more: Json) -> None:
    """The digest that sets cached keys and values apart is that of the edits alone."""
    document, _ = compilable({k: v for k, v in document.items() if k not in ("readings", "on")}, catalog)
    plain, reads = compile_doc(document, catalog), compile_doc(document | more, catalog)
    assert plain is not None
    assert reads is not None
    assert reads.edits == plain
    assert reads.edits.digest == plain.digest != reads.digest
    assert Footprint.of(reads, 7) == Footprint.of(plain, 7)
    assert plain.first_read(7) is None


def test_what_is_only_read_is_in_no_footprint(catalog: Catalog) -> None:
    for document in READ_ONLY:
        compiled = compile_doc(document, catalog)
        assert compiled is not None
        assert compiled.edits is None
        assert Footprint.of(compiled, 7).key(0, 64) is None


def test_the_first_position_that_is_read(catalog: Catalog) -> None:
    firsts = {"all": 0, "prompt": 0, "completion": 6}
    for positions, first in firsts.items():
        compiled = compile_doc({"readings": READ | {"positions": positions}}, catalog)
        assert compiled is not None
        assert compiled.first_read(7) == first
    ranges = compile_doc({"readings": READ | {"positions": {"ranges": [[9, 12], [4, 5]]}}, "on": [FLAG]}, catalog)
    assert ranges is not None
    assert (ranges.first_read(7), ranges.first_read(3)) == (4, 2)
