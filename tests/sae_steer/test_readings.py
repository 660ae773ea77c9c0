"""What is read: told once and whole however a request was cut into steps, and what every field of a reading changes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import sae_steer
from sae_steer import readings
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import NonFinite, SchemaError, Unsupported
from sae_steer.inprocess import Steer
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.read_rows import layout, merged_top
from sae_steer.readings import Reader, computed_values, extend, reading_values
from sae_steer.reference import encode
from sae_steer.sae import open_sae
from sae_steer.wire import check, parse, to_text
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import FEATURES, HIDDEN, SITES, Json, compile_doc, edit, make_catalog, steering, tiny_model

P = 5
DOCUMENT: Json = {
    "readings": [
        {"sae": "r1", "features": [3, 9], "positions": "all"},
        {"sae": "w1", "features": [2], "top_k": 3, "positions": "completion"},
        {"sae": "r1", "features": [3], "positions": {"ranges": [[1, 3], [6, 8]]}, "per_token": False},
    ],
    "on": [
        {"sae": "r1", "feature": 9, "above": 1.0, "action": "flag"},
        {"sae": "r1", "feature": 3, "above": 2.0, "action": "stop"},
    ],
}
ANYTHING = sae_steer.capabilities.Capabilities("toy", ())


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def program(catalog: Catalog) -> Program:
    compiled = compile_doc(DOCUMENT, catalog, capabilities=ANYTHING)
    assert compiled is not None
    return compiled


def named(*_: object) -> str:
    return "name"


def rows_for(program: Program, count: int, seed: int) -> Any:
    """Rows as a host makes them: the largest features in order, some of them missing."""
    random = np.random.default_rng(seed)
    columns, _, width = layout(program)
    rows = random.integers(0, 4, (count, width)).astype(np.float64)
    for own in columns:
        k = own.ids.stop - own.ids.start
        for row in rows:
            active = random.integers(0, k + 1)
            row[own.ids] = np.where(np.arange(k) < active, random.permutation(FEATURES)[:k], -1)
            row[own.top] = np.where(np.arange(k) < active, -np.sort(-random.random(k)), 0)
    return rows


# ------------------------------------------------------------------------------------------- the reader


@settings(max_examples=80)
@given(count=st.integers(1, 12), seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 12), max_size=5))
def test_steps_and_what_is_computed_again_change_nothing(
    program: Program, count: int, seed: int, cuts: list[int]
) -> None:
    rows, positions, tokens = rows_for(program, count, seed), np.arange(count), np.arange(count) + 100
    whole = Reader(program, P)
    whole.take(positions, tokens, rows)
    pieces = Reader(program, P)
    told: list[dict[str, Any]] = []
    for end in [*cuts, count]:
        # Each step begins anew, as after a preemption: what was told is not told again.
        pieces.take(positions[:end], tokens[:end], rows[:end])
        extend(told, pieces.new(named, str) or [])
    last = pieces.finish(named, str)
    extend(told, last["readings"])
    assert last | {"readings": told} == whole.finish(named, str)
    assert pieces.stop == whole.stop
    assert pieces.told == whole.told


@settings(max_examples=40)
@given(prompt=st.integers(1, 9), new=st.integers(1, 9))
def test_an_answer_has_as_many_values_as_were_foretold(program: Program, prompt: int, new: int) -> None:
    count = prompt + new - 1
    reader = Reader(program, prompt)
    reader.take(np.arange(count), np.zeros(count, np.int64), rows_for(program, count, 1))
    told = reader.finish(named, None, keep=True)["readings"]
    most = sum(len(r["positions"]) * (len(r["features"]) + (3 if "top" in r else 0)) for r in told if "positions" in r)
    assert reading_values(program, prompt, new) == most == reader.told
    assert told == reader.finish(named, None)["readings"], "kept"
    assert reader.finish(named, None)["readings"] != told, "told once"


def test_a_trigger_fires_where_its_feature_is_above_its_threshold(program: Program) -> None:
    rows, columns = rows_for(program, 9, 0), layout(program)[1]
    rows[:, columns] = 0
    rows[2, columns] = 9, 9  # in the prompt
    rows[[4, 6, 7], columns.start] = 1.5, 1.0, 3.0  # 1.0 is not above 1.0
    rows[7:, columns.start + 1] = 2.5
    reader = Reader(program, P)
    reader.take(np.arange(9), np.zeros(9, np.int64), rows)
    found = reader.finish(named, None)
    flag, stop = found["triggers"]
    assert (flag["fired"], flag["first"], flag["value"]) == (2, 4, 1.5)
    assert (stop["fired"], stop["first"], stop["value"]) == (2, 7, 2.5)
    assert reader.stop == 7
    assert found["trigger"] == stop


def test_what_is_not_finite_ends_the_request(program: Program) -> None:
    rows = rows_for(program, 3, 0)
    rows[1, 0] = np.nan
    reader = Reader(program, P)
    reader.take(np.arange(3), np.zeros(3, np.int64), rows)
    assert isinstance(reader.failure, NonFinite)


def test_nothing_read_is_told_as_nothing(program: Program) -> None:
    first, second, third = Reader(program, P).finish(named, str)["readings"]
    assert first["positions"] == first["values"] == second["top"] == second["top_summary"] == []
    assert third["summary"] == [
        {"feature": 3, "max": 0.0, "argmax": None, "mean": 0.0, "last": 0.0, "fired": 0.0, "tokens": 0}
    ]


@settings(max_examples=80)
@given(
    f=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    edits=st.dictionaries(st.integers(0, 7), st.integers(-1, 4), max_size=4),
    k=st.integers(1, 8),
)
def test_the_largest_after_the_edits(f: list[int], edits: dict[int, int], k: int) -> None:
    """From the k + E largest before them: ties go to the lower number, and what is not above 0 is not listed."""

    def largest(values: dict[int, int], most: int) -> list[tuple[int, int]]:
        return sorted(((i, v) for i, v in values.items() if v > 0), key=lambda pair: (-pair[1], pair[0]))[:most]

    before = dict(enumerate(f))
    known = k + len(edits)
    pairs = largest(before, known) + [(-1, 0)] * known
    ids, top = (np.array([[pair[i] for pair in pairs[:known]]], dtype=np.float64) for i in (0, 1))
    numbers, after = np.array(list(edits), dtype=np.float64), np.array([list(edits.values())], dtype=np.float64)
    found, values = merged_top(ids, top, numbers, after, k)
    pairs = [(int(i), int(v)) for i, v in zip(found[0], values[0], strict=True) if i >= 0]
    assert pairs == largest(before | edits, k)


def test_what_is_only_summed_up_is_counted_too(program: Program) -> None:
    """The third reading sends nothing of its tokens; each token is counted with all that a row of it holds."""
    silent = replace(program, readings=tuple(replace(r, per_token=False) for r in program.readings))
    width = layout(program)[2]
    assert width == 2 + (1 + 2 * 3) + 1 + 2
    for prompt, new in ((1, 1), (4, 6), (9, 3)):
        tokens = prompt + new - 1
        assert reading_values(silent, prompt, new) == 0
        assert computed_values(silent, prompt, new) == computed_values(program, prompt, new) == tokens * width
        reader = Reader(silent, prompt)
        reader.take(np.arange(tokens), np.zeros(tokens, np.int64), rows_for(silent, tokens, 1))
        assert reader.computed == tokens * width
    last = replace(program, readings=(program.readings[1],), triggers=())
    assert computed_values(last, 5, 3) == 3 * (1 + 2 * 3), "the prompt's last token and two more"


class ForgetsTies(readings._Top):
    """Takes the last of equals for where a feature was largest."""

    def add(self, positions: Any, ids: Any, values: Any) -> None:
        super().add(positions[::-1], ids[::-1], values[::-1])


tokens_of_top = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=3, unique_by=lambda pair: pair[0]), min_size=1
)


def judge_top(top: Any, steps: list[list[list[tuple[int, int]]]], k: int) -> None:
    """Compares the sums of some steps' tokens, each with the features that it has, with a loop over all of them."""
    seen: dict[int, list[tuple[int, int]]] = {}
    position = 10
    for step in steps:
        ids, values = np.full((len(step), 3), -1.0), np.zeros((len(step), 3))
        first = position
        for row, features in enumerate(step):
            for column, (feature, value) in enumerate(sorted(features, key=lambda pair: (-pair[1], pair[0]))):
                ids[row, column], values[row, column] = feature, value
                seen.setdefault(feature, []).append((position, value))
            position += 1
        top.add(np.arange(first, position), ids, values)
    count, last = position - 10, position - 1
    wanted = []
    for feature, found in seen.items():
        largest = max(value for _, value in found)
        wanted.append(
            {
                "feature": feature,
                "max": largest,
                "argmax": next(at for at, value in found if value == largest),
                "mean": sum(value for _, value in found) / count,
                "last": dict(found).get(last, 0.0),
                "fired": len(found) / count,
                "tokens": count,
            }
        )
    wanted.sort(key=lambda entry: (-entry["max"], entry["feature"]))
    assert top.entries(count, k, last) == wanted[:k]


@settings(max_examples=150)
@given(steps=st.lists(tokens_of_top, min_size=1, max_size=3), k=st.integers(1, 4))
def test_the_largest_are_summed_up_as_a_loop_would(steps: list[list[list[tuple[int, int]]]], k: int) -> None:
    judge_top(readings._Top(), steps, k)


def test_the_loop_tells_the_first_of_equals() -> None:
    with pytest.raises(AssertionError):
        judge_top(ForgetsTies(), [[[(1, 2)], [(1, 2), (3, 2)]]], 2)


# ------------------------------------------------------------------------------------------- between processes


def test_a_program_that_reads_survives_the_wire(program: Program, catalog: Catalog) -> None:
    again = parse(to_text(program))
    assert again == program
    assert again.digest == program.digest
    check(again, catalog, Limits(), SITES)


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_twice_in_the_catalog_and_held_whole_once(first: bool, tmp_path: Path) -> None:
    """Whichever of its two names comes last: the dictionary is there."""
    write_saelens(tmp_path, d_in=HIDDEN, hook_name="blocks.1.hook_resid_post")
    sae = open_sae(tmp_path)
    both = [CatalogSae.make("held", sae, whole=True), CatalogSae.make("rows", sae)]
    catalog = Catalog(both if first else both[::-1], [])
    asked = compile_doc({"readings": {"sae": "held", "top_k": 3}}, catalog, capabilities=ANYTHING)
    assert asked is not None
    check(asked, catalog, Limits(), SITES)
    part = Catalog([CatalogSae.make("rows", sae)], [])
    with pytest.raises(SchemaError, match="more of a dictionary than there is"):
        check(asked, part, Limits(), SITES)


CORRUPT: dict[str, Any] = {
    "row": lambda p: replace(p, readings=(replace(p.readings[0], rows=(99,)),)),
    "another sae's row": lambda p: replace(p, readings=(replace(p.readings[0], source=p.readings[1].source),)),
    "source": lambda p: replace(p, readings=(replace(p.readings[0], source="sha256:0"),)),
    "selector": lambda p: replace(p, readings=(replace(p.readings[0], selector=9),)),
    "top_k": lambda p: replace(p, readings=(replace(p.readings[1], top_k=FEATURES + 1),)),
    "negative top_k": lambda p: replace(p, readings=(replace(p.readings[1], top_k=-1),)),
    "top_k of a part": lambda p: replace(p, readings=(replace(p.readings[0], top_k=1),)),
    "site": lambda p: replace(p, readings=(replace(p.readings[0], site=SITES[0]),)),
    "many": lambda p: replace(p, readings=p.readings * 9),
    "trigger's row": lambda p: replace(p, triggers=(replace(p.triggers[0], row=99),)),
    "trigger's selector": lambda p: replace(p, triggers=(replace(p.triggers[0], selector=-1),)),
    "threshold": lambda p: replace(p, triggers=(replace(p.triggers[0], above=float("nan")),)),
    "by token ids": lambda p: replace(p, selectors=tuple(replace(s, skip_token=1) for s in p.selectors)),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_reading_is_refused(case: str, program: Program, catalog: Catalog) -> None:
    with pytest.raises(SchemaError):
        check(CORRUPT[case](program), catalog, Limits(), SITES)


# ------------------------------------------------------------------------------------------- in process


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def steer(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Iterator[Steer]:
    folders = [tmp_path_factory.mktemp("sae") for _ in range(2)]
    for seed, folder in enumerate(folders):
        write_saelens(folder, d_in=HIDDEN, hook_name="blocks.1.hook_resid_post", seed=seed + 3)
    saes = {name: open_sae(folder) for name, folder in zip(("res", "other"), folders, strict=True)}
    with sae_steer.attach(model, saes, whole=["res", "other"]) as attached:
        yield attached


def read(steer: Steer, document: Json) -> Json:
    ids = torch.tensor([[1, 17, 33, 4, 9]])
    with steer.rows([document]) as rows:
        steer.model.generate(ids, max_new_tokens=4, do_sample=False)
    [report] = rows.reports()
    assert report is not None
    assert rows.reports() == [report], "asked again, it says the same"
    return report


BASE: Json = {"sae": "res", "features": [3, 4], "top_k": 2, "positions": "all", "at": "before", "per_token": True}
OTHER: Json = {
    "sae": "other",
    "features": [4],
    "top_k": 3,
    "positions": "completion",
    "at": "after",
    "per_token": False,
}


@pytest.mark.parametrize("field", sorted(sae_steer.schema.Readings.model_fields))
def test_every_field_changes_what_is_told(field: str, steer: Steer) -> None:
    edits = steering(edit(sae="res", features=[3], value=9.0))["interventions"]
    one, other = (
        read(steer, {"interventions": edits, "readings": asked})["readings"]
        for asked in (BASE, BASE | {field: OTHER[field]})
    )
    assert one != other


def test_what_is_read_is_what_the_definition_says(steer: Steer, model: PreTrainedModel) -> None:
    """Readings of one SAE beside another, in one batch with a plain row and a steered one."""
    ids = torch.tensor([[1, 17, 33, 4, 9]] * 3)
    asks = [{"readings": [BASE, OTHER | {"at": "before", "per_token": True}]}, None, steering(edit(sae="res"))]
    with torch.no_grad():
        bare = model(ids, output_hidden_states=True)
        with steer.rows(asks) as rows:
            outputs = model(ids)
        assert torch.equal(outputs.logits[:2], bare.logits[:2])
    [report, nothing, edited] = rows.reports()
    assert report is not None
    assert nothing is None
    assert edited is not None
    assert "readings" not in edited
    for sae, asked in (("res", report["readings"][0]), ("other", report["readings"][1])):
        for row, position in enumerate(asked["positions"]):
            f = encode(steer.catalog.sae(sae).sae, bare.hidden_states[2][0, position].double())
            assert asked["values"][row] == pytest.approx([float(f[i]) for i in asked["features"]], abs=1e-4)
            best = sorted(range(len(f)), key=lambda i: -float(f[i]))[: len(asked["top"][row])]
            assert [feature for feature, _ in asked["top"][row]] == best
    assert report["readings"][0]["positions"] == [0, 1, 2, 3, 4]
    assert report["readings"][1]["positions"] == [4]


def test_no_trigger_ends_a_loop_that_is_not_ours(steer: Steer) -> None:
    stop = {"on": [{"sae": "res", "feature": 3, "above": 0.0, "action": "stop"}]}
    with pytest.raises(Unsupported, match="StoppingCriteria"):
        steer.compile(stop)


def test_top_k_needs_the_whole_dictionary(tmp_path: Path, model: PreTrainedModel) -> None:
    write_saelens(tmp_path, d_in=HIDDEN, hook_name="blocks.1.hook_resid_post")
    with sae_steer.attach(model, {"res": tmp_path}) as part, pytest.raises(Unsupported, match="--whole res"):
        part.compile({"readings": {"sae": "res", "top_k": 1}})
