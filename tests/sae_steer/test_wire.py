"""Programs as text: what the compiler makes comes back equal, and nothing else gets past the check."""

import contextlib
import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_steer.catalog import Catalog
from sae_steer.errors import RequestError, SchemaError
from sae_steer.limits import Limits
from sae_steer.program import GainTable, Phase, Program, Row, Selector, SiteProgram
from sae_steer.runs import RunTable
from sae_steer.sites import Site
from sae_steer.slots import buckets_of
from sae_steer.tables import GAIN_BINS, SiteTables
from sae_steer.wire import check, parse, to_text
from tests.sae_steer.helpers import (
    SITES,
    WIDTH,
    Json,
    compile_doc,
    documents,
    edit,
    interventions,
    make_catalog,
    program,
    steering,
    vector_edit,
)

LIMITS = Limits(max_programs=2, rows=4, wide_programs=1, wide_rows=9, dose_limit=50.0)
KNOWN: dict[str, Any] = {
    "saes": st.sampled_from(["r0", "r1", "twin", "r1b", "tkw", "w1", "tc"]),
    "vectors": st.sampled_from(["v", "u"]),
    "sites": st.sampled_from([str(site) for site in SITES[:3]]),
    "features": st.integers(0, 31),
    "calibrations": st.sampled_from([("cal", "rude"), ("cal", "sad"), ("cal0", "calm")]),
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


def compiled(document: Json, catalog: Catalog) -> Program:
    """The program of a drawn document; one that the compiler refuses is no example."""
    found = None
    with contextlib.suppress(RequestError):
        found = compile_doc(document, catalog, limits=LIMITS)
    assume(found is not None)
    assert found is not None
    return found


def accepts(text: str, catalog: Catalog) -> Program | None:
    """The program, where a host would run it; None where it is refused, and nothing but a refusal is ever raised."""
    try:
        found = parse(text)
        check(found, catalog, LIMITS, SITES)
    except SchemaError:
        return None
    return found


# ------------------------------------------------------------------------------------------- there and back


@st.composite
def known_documents(draw: st.DrawFn) -> Json:
    """Documents that name what the catalog has, and so mostly compile."""
    document = draw(documents(**KNOWN))
    asked = {key: document[key] for key in ("error", "dose") if key in document}
    return asked | {"interventions": draw(st.lists(interventions(**KNOWN), min_size=1, max_size=3))}


@settings(max_examples=100)
@given(document=known_documents())
def test_what_the_compiler_makes_comes_back_equal(document: Json, catalog: Catalog) -> None:
    sent = compiled(document, catalog)
    digest = sent.digest  # before it is written: what was computed on the way must not travel
    text = to_text(sent)
    back = parse(text)
    assert back == sent
    assert back.digest == digest
    assert hash(back) == hash(sent)
    check(back, catalog, LIMITS, SITES)
    assert to_text(back) == text


def test_what_the_compiler_never_makes_comes_back_too(catalog: Catalog) -> None:
    """Gain tables are for operations that no host has yet; infinities and floats that decimals cannot write."""
    gain = GainTable.of(0.1, (0.1 + 0.2, 5e-324), 1 / 3, (1.0,))
    source = catalog.sae("r1").sae.fingerprint
    rows = (Row(source, 1, "app", gamma=2 / 3, selector=0, gain=gain), Row(source, 2, "cap", hi=-0.0, selector=1))
    selectors = (Selector(Phase.RANGES, ((0, 3), (7, 9))), Selector(Phase.COMPLETION, (), 1, (4, 5)))
    sent = Program((SiteProgram(SITES[2], rows, None),), selectors, math.inf, "scale")
    back = parse(to_text(sent))
    assert back == sent
    assert back.digest == sent.digest
    assert math.copysign(1, back.sites[0].rows[1].hi) == -1
    check(replace(back, dose_limit=1.0), catalog, LIMITS, SITES)


def test_every_field_travels(catalog: Catalog) -> None:
    """Two programs that differ in anything have different texts."""
    base = program(edit(), edit(features=[4], when={"sae": "r1", "feature": 9, "above": 0.5}), catalog=catalog)
    part = base.sites[0]
    row, gated = part.rows[0], part.rows[1]
    assert gated.gate is not None

    def with_row(**fields: Any) -> Program:
        return replace(base, sites=(replace(part, rows=(replace(row, **fields), *part.rows[1:])),))

    others = [
        with_row(source="sha256:0"),
        with_row(feature=7),
        with_row(op="add"),
        with_row(unit=True),
        with_row(norm_units=True),
        with_row(selector=-1),
        with_row(gate=replace(gated.gate, row=0)),
        with_row(gate=replace(gated.gate, above=0.25)),
        with_row(gate=replace(gated.gate, below=7.0)),
        with_row(gain=GainTable.of(1.0, (1.0,))),
        with_row(gain=GainTable.of(1.0, (1.0,), 1.0, (2.0,))),
        *(with_row(**{name: 0.125}) for name in ("scale", "shift", "lo", "hi", "mask_lo", "mask_hi", "gamma")),
        replace(base, sites=(replace(part, site=SITES[0]),)),
        replace(base, sites=(replace(part, drop=row.source),)),
        replace(base, selectors=(Selector(Phase.PROMPT),)),
        replace(base, selectors=(Selector(Phase.ALL, skip_token=1),)),
        replace(base, selectors=(Selector(Phase.ALL, token_in=(1,)),)),
        replace(base, dose_limit=1.0),
        replace(base, on_dose="scale"),
    ]
    texts = [to_text(found) for found in (base, *others)]
    assert len(set(texts)) == len(texts)
    assert [parse(text) for text in texts] == [base, *others]


# ------------------------------------------------------------------------------------------- refusals

GARBAGE = ["", "x", "null", "[]", "{}", "0", '"sae"', "NaN", "[" * 10**5, "\ud800", '"\\ud800"', "\x00", '{"sites":[]}']


@pytest.mark.parametrize("text", [*GARBAGE, None, 5, b"{}", {"sites": []}, ["x"]], ids=lambda t: repr(t)[:20])
def test_garbage_is_refused(text: Any) -> None:
    with pytest.raises(SchemaError):
        parse(text)


def sample(catalog: Catalog) -> Json:
    """A program of every kind of part, as JSON."""
    gate = {"sae": "w1", "feature": 9, "above": 0.5, "token_in": [3, 4]}
    made = program(
        edit(sae="w1", features=[1, 2], when=gate),
        edit(sae="r0", op="mask_range", value=None, lo=0.0, hi=1.0, positions={"ranges": [[0, 3], [5, 9]]}),
        vector_edit(skip_bos=True),
        catalog=catalog,
        dose={"limit": 2.0},
    )
    return json.loads(to_text(made))  # type: ignore[no-any-return]


def gains(width: float, values: list[float]) -> Json:
    """A gain table as it is sent."""
    return asdict(GainTable.of(width, values))


ROW = ("sites", 1, "rows", 1)  # the first is the direction
SELECTORS: Json = {"phase": "all", "ranges": [], "skip_token": None, "token_in": None}
NAN, INF = math.nan, math.inf
WRONG: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("sites",), [], "no place"),
    ((*ROW[:2], "rows"), [], "names nothing"),
    ((*ROW[:2], "drop"), "sha256:0", "drops the error"),
    ((*ROW[:2], "site", "read", "layer"), 0, "not hooked"),
    ((*ROW[:2], "site", "write", "layer"), -1, "not hooked"),
    ((*ROW[:2], "site", "read", "layer"), 10**30, "not hooked"),
    ((*ROW, "source"), "sha256:0", "no feature 1"),
    ((*ROW, "source"), "", "no feature 1"),
    ((*ROW, "feature"), 32, "no feature 32"),
    ((*ROW, "feature"), -1, "no feature -1"),
    ((*ROW, "feature"), 10**30, "no feature"),
    ((*ROW, "feature"), 2, "one feature twice"),
    ((*ROW, "selector"), 3, "a selector that is not there"),
    ((*ROW, "selector"), -2, "a selector that is not there"),
    ((*ROW, "gate", "row"), 9, "a gate that is not there"),
    ((*ROW, "gate", "row"), -1, "a gate that is not there"),
    *(((*ROW, name), NAN, "not finite") for name in ("scale", "shift", "gamma", "lo", "hi", "mask_lo", "mask_hi")),
    *(((*ROW, name), INF, "not finite") for name in ("scale", "shift", "gamma")),
    *(((*ROW, name), -1e300, "too large") for name in ("scale", "shift", "lo", "hi", "mask_lo", "mask_hi")),
    ((*ROW, "gate", "above"), NAN, "not finite"),
    ((*ROW, "gate", "below"), 1e300, "too large"),
    ((*ROW, "gain"), gains(NAN, [1.0]), "not finite"),
    ((*ROW, "gain"), gains(-1.0, [1.0]), "not finite"),
    ((*ROW, "gain"), gains(1.0, [INF]), "not finite"),
    ((*ROW, "gain"), gains(1.0, [1.0] * (GAIN_BINS + 1)), "too large"),
    ((*ROW, "gain"), {"width_pos": 1.0, "positive": "AACAPw"}, "not finite"),
    ((*ROW, "gain"), {"width_pos": 1.0, "positive": "AACAPwA="}, "not finite"),
    ((*ROW, "gain"), {"width_pos": 1.0, "positive": "not base64"}, "not finite"),
    (("selectors",), [], "no selector"),
    (("selectors",), [SELECTORS | {"skip_token": i} for i in range(32)], "too many"),
    (("selectors", 1), SELECTORS | {"token_in": [3, 4]}, "selector is there twice"),
    (("selectors", 0, "ranges"), [[3, 3]], "holds nowhere"),
    (("selectors", 0, "ranges"), [[-4, 3]], "holds nowhere"),
    (("selectors", 0, "ranges"), [[0, 10**30]], "holds nowhere"),
    (("selectors", 0, "ranges"), [[2 * i, 2 * i + 1] for i in range(65)], "holds nowhere"),
    (("selectors", 0, "skip_token"), -3, "holds nowhere"),
    (("selectors", 0, "skip_token"), 10**30, "holds nowhere"),
    (("selectors", 0, "token_in"), [-3], "holds nowhere"),
    (("dose_limit",), 0.0, "dose limit"),
    (("dose_limit",), -1.0, "dose limit"),
    (("dose_limit",), NAN, "dose limit"),
    (("dose_limit",), 51.0, "dose limit"),
]


@pytest.mark.parametrize(("path", "value", "why"), WRONG, ids=lambda v: str(v)[:40])
def test_each_thing_that_cannot_run_is_refused(
    path: tuple[str | int, ...], value: Any, why: str, catalog: Catalog
) -> None:
    document = sample(catalog)
    assert accepts(json.dumps(document), catalog) is not None
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(SchemaError, match=why):
        check(parse(json.dumps(document)), catalog, LIMITS, SITES)


def drop(changed: Json) -> None:
    changed["sites"][0]["drop"] = changed["sites"][0]["rows"][0]["source"]


def widen(changed: Json) -> None:
    rows = changed["sites"][1]["rows"]
    row = rows[1] | {"gate": None}
    changed["sites"][1]["rows"] = [row | {"feature": i} for i in range(10)]


def repeat(changed: Json) -> None:
    changed["sites"].append(changed["sites"][1])


@pytest.mark.parametrize(("change", "why"), [(drop, "as a whole"), (widen, "than a slot holds"), (repeat, "twice")])
def test_what_takes_more_than_one_value_to_get_wrong(
    change: Callable[[Json], None], why: str, catalog: Catalog
) -> None:
    document = sample(catalog)
    change(document)
    with pytest.raises(SchemaError, match=why):
        check(parse(json.dumps(document)), catalog, LIMITS, SITES)


def test_a_topk_feature_needs_its_whole_dictionary(catalog: Catalog) -> None:
    whole = program(edit(sae="tkw"), catalog=catalog, limits=LIMITS)
    check(whole, catalog, LIMITS, SITES)
    rows_alone = catalog.sae("tk").sae.fingerprint
    part = replace(whole.sites[0], rows=(replace(whole.sites[0].rows[0], source=rows_alone),))
    with pytest.raises(SchemaError, match="TopK"):
        check(replace(whole, sites=(part,)), catalog, LIMITS, SITES)


def test_a_direction_is_written_where_it_is_read(catalog: Catalog) -> None:
    straight = program(vector_edit(), catalog=catalog, limits=LIMITS)
    check(straight, catalog, LIMITS, SITES)
    across = replace(straight, sites=(replace(straight.sites[0], site=SITES[3]),))
    with pytest.raises(SchemaError, match="no feature -1"):
        check(across, catalog, LIMITS, SITES)


# ------------------------------------------------------------------------------------------- anything at all


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["all", "ranges", "resid_post", "z", "scale", "sha256:0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400)
@given(data=st.data())
def test_whatever_is_sent_is_refused_or_can_run(data: st.DataObject, catalog: Catalog) -> None:
    """A worker loads what was accepted, in a place where an error would end the engine for everybody."""
    document = sample(catalog)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)[1:]))
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        match data.draw(st.sampled_from(["put", "take", "move"])):
            case "put":
                place[path[-1]] = data.draw(anything)
            case "take":
                del place[path[-1]]
            case _:
                source: Any = document
                for step in data.draw(st.sampled_from(places(document)[1:])):
                    source = source[step]
                place[path[-1]] = deepcopy(source)
        if not document:
            return
    text = json.dumps(document)
    with contextlib.suppress(UnicodeEncodeError):
        assert accepts(text[: len(text) // 2], catalog) is None
    found = accepts(text, catalog)
    if found is not None:
        load(found, catalog)


def load(accepted: Program, catalog: Catalog) -> None:
    """All that a worker does with a program before it runs."""
    limits = buckets_of(LIMITS)
    bucket = next(number for number, bucket in enumerate(limits) if accepted.rows <= bucket.rows)
    for part in accepted.sites:
        tables_of(part.site, catalog).write(bucket, 1, part, accepted)
    for prompt_length in (0, 1, 7):
        RunTable(1, bucket, torch.device("cpu")).add(accepted, 1, prompt_length)
    assert accepted.by_token(64).shape == (64,)
    assert accepted.digest


_TABLES: dict[Site, SiteTables] = {}


def tables_of(site: Site, catalog: Catalog) -> SiteTables:
    if site not in _TABLES:
        _TABLES[site] = SiteTables.fit(
            site,
            catalog,
            buckets=buckets_of(LIMITS),
            width=WIDTH,
            width_out=WIDTH,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    return _TABLES[site]


@settings(max_examples=200)
@given(text=st.text(max_size=30) | anything.map(json.dumps))
def test_any_text_is_read_or_refused(text: str, catalog: Catalog) -> None:
    assert accepts(text, catalog) is None


def test_the_sample_is_of_every_kind(catalog: Catalog) -> None:
    """So that a place in it that is changed is a place that is checked."""
    document = sample(catalog)
    rows = [row for part in document["sites"] for row in part["rows"]]
    assert any(row["gate"] for row in rows)
    assert any(row["feature"] == -1 for row in rows)
    assert any(row["selector"] == -1 for row in rows)
    assert len(document["selectors"]) == 3
    assert compile_doc(steering(), catalog) is None
