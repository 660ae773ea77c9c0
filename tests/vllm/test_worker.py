"""The part beside the model: every request is edited as if it were alone, whatever shares its steps and its slot."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.catalog import Catalog
from sae_steer.program import Program
from sae_steer.report import applied_block
from sae_steer.runs import TOUCHED, Sums
from sae_steer.sites import Site
from sae_steer.slots import Slot, buckets_of
from sae_steer_vllm.gate import Gate
from tests.sae_steer.helpers import Json, compile_doc, edit, make_catalog, steering, vector_edit
from tests.vllm.toy import LIMITS, VOCABULARY, Chunk, Engine, LlamaForCausalLM, by_definition, editors

MORE = tuple(Site.parse(name) for name in ("resid_pre.0", "resid_mid.1", "resid_pre.2"))
IDS = list(range(2, 14))
PROMPT = 5
S = Slot(0, 1)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


def engine_of(catalog: Catalog, splits: Sequence[Sequence[int]] = (range(3),)) -> Engine:
    return Engine([catalog] * len(splits), catalog.sites(MORE), splits)


DOCUMENTS: dict[str, Json] = {
    "everywhere": steering(edit(), edit(sae="r0", features=[1], op="add", value=3.0), vector_edit(site="resid_pre.0")),
    "completion": steering(edit(features=[7, 8], op="ablate", value=None, positions="completion")),
    "prompt": steering(edit(value=4.0, positions="prompt"), vector_edit(site="resid_pre.2", value=-3.0)),
    "transcoder": steering(edit(sae="tc", features=[2, 3], value=1.5), vector_edit(site="resid_mid.1", value=1.0)),
    "tokens": steering(vector_edit(when={"token_in": [3, 6, 12]}, value=5.0), edit(sae="tkw", features=[1])),
    "wide": steering(edit(features=[1, 2, 3, 4, 5], value=[1.0, 2.0, 3.0, 4.0, 5.0])),
    "limited": steering(edit(value=50.0), dose={"limit": 0.5, "on_dose": "scale"}),
    "whole": steering(edit(sae="w1", features=[3]), error="drop"),
}


def compiled(document: Json, catalog: Catalog) -> Program:
    made = compile_doc(document, catalog, limits=LIMITS, sites=catalog.sites(MORE))
    assert made is not None
    return made


def block(engine: Engine, catalog: Catalog, name: str, made: Program) -> Json:
    """The report of a request in the last step's snapshot."""
    sums = Sums(made, np.array(engine.values(name)))
    assert sums.failure is None
    return applied_block(sums.tallies(), sums.touched, catalog.name_of)


def alone(catalog: Catalog, document: Json) -> tuple[torch.Tensor, Json]:
    """A request's rows and report, where nothing else is there and it is computed in one step."""
    engine, made = engine_of(catalog), compiled(document, catalog)
    engine.meet("a", made, slot_of(made), PROMPT)
    rows = engine.step([Chunk("a", 0, IDS)])["a"]
    return rows, block(engine, catalog, "a", made)


def slot_of(made: Program, index: int = 1) -> Slot:
    return Slot(0 if made.rows <= LIMITS.rows else 1, index)


def close(a: Any, b: Any) -> bool:
    """Whether two reports are the same, up to the rounding of float32 in sums of another order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-5, abs=1e-5) if isinstance(a, float) else bool(a == b)


# ------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("name", DOCUMENTS)
def test_edits_are_those_of_the_definition(name: str, catalog: Catalog) -> None:
    rows, report = alone(catalog, DOCUMENTS[name])
    expected = by_definition(catalog, catalog.sites(MORE), DOCUMENTS[name], IDS, PROMPT)
    plain = by_definition(catalog, catalog.sites(MORE), None, IDS, PROMPT)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=0.01)
    moved = (expected - plain).abs().amax(dim=1) > 1e-3
    assert report["tokens"] >= int(moved.sum()) > 0
    assert report["fired"] > 0


def test_reports_by_hand(catalog: Catalog) -> None:
    _, report = alone(catalog, DOCUMENTS["completion"])
    assert report["tokens"] == len(IDS) - PROMPT + 1
    assert [entry["tokens"] for entry in report["features"]] == [8, 8]
    assert [entry["mean_after"] for entry in report["features"]] == [0.0, 0.0]
    _, report = alone(catalog, DOCUMENTS["prompt"])
    assert report["tokens"] == len(IDS)  # the vector goes everywhere, and the feature where the prompt is
    assert [entry["tokens"] for entry in report["features"]] == [4, 12]
    assert report["features"][0]["mean_after"] == 4.0
    _, report = alone(catalog, DOCUMENTS["limited"])
    assert report["dose"]["limited"] == len(IDS)
    assert report["sites"] == ["resid_post.1"]


# ------------------------------------------------------------------------------------------- together

moves = st.lists(
    st.tuples(st.sampled_from([*DOCUMENTS, None]), st.integers(1, 6), st.sampled_from([0, 0, 0, 2, 20])),
    min_size=1,
    max_size=5,
)


class Crowd:
    """Requests of every program that come and go, with slots from the gate."""

    def __init__(self, catalog: Catalog, splits: Sequence[Sequence[int]]) -> None:
        self.catalog, self.engine = catalog, engine_of(catalog, splits)
        self.gate: Gate[str] = Gate(buckets_of(LIMITS))
        self.running: dict[str, tuple[str | None, int]] = {}
        self.waiting: dict[str, str] = {}
        self.number = 0

    def enter(self, name: str | None) -> None:
        self.number += 1
        request = f"{name}-{self.number}"
        if name is None:
            self.start(request, None, S)
            return
        self.waiting[request] = name
        slot = self.gate.enter(request, request, compiled(DOCUMENTS[name], self.catalog), may_end=False)
        if slot is not None:
            self.start(request, self.waiting.pop(request), slot)

    def start(self, request: str, name: str | None, slot: Slot) -> None:
        made = compiled(DOCUMENTS[name], self.catalog) if name is not None else None
        self.engine.meet(request, made, slot, PROMPT)
        self.running[request] = name, 0

    def step(self, counts: Sequence[tuple[int, int]], padding: int, expected: dict[str | None, Any]) -> None:
        chunks = []
        for (request, (name, done)), (count, back) in zip(list(self.running.items()), counts, strict=False):
            start = max(done - back, 0)
            ids = IDS[start : start + count]
            if ids:
                chunks.append(Chunk(request, start, ids))
                self.running[request] = name, start + len(ids)
        if not chunks:
            return
        found = self.engine.step(chunks, padding=padding)
        for chunk in chunks:
            name, done = self.running[chunk.request]
            rows = expected[name][0][chunk.start : done]
            torch.testing.assert_close(found[chunk.request], rows, rtol=1e-5, atol=1e-5)
            if done == len(IDS):
                self.finish(chunk.request, name, expected)

    def finish(self, request: str, name: str | None, expected: dict[str | None, Any]) -> None:
        if name is not None:
            made = compiled(DOCUMENTS[name], self.catalog)
            assert close(block(self.engine, self.catalog, request, made), expected[name][1])
        self.engine.forget(request)
        del self.running[request]
        for admitted, slot in self.gate.leave(request):
            self.start(admitted, self.waiting.pop(admitted), slot)


@pytest.fixture(scope="module")
def expected(catalog: Catalog) -> dict[str | None, Any]:
    plain = by_definition(catalog, catalog.sites(MORE), None, IDS, PROMPT).float()
    return {name: alone(catalog, document) for name, document in DOCUMENTS.items()} | {None: (plain, None)}


@pytest.mark.parametrize("splits", [(range(3),), ([0], [1, 2]), ([0], [1], [2])], ids=["one", "two", "three"])
def test_every_request_is_as_if_it_were_alone(
    splits: Sequence[Sequence[int]], catalog: Catalog, expected: dict[str | None, Any]
) -> None:
    """In one process, and in stages of a pipeline that hand on their sums; three slots, so that all are reused."""

    @settings(max_examples=25)
    @given(steps=st.lists(st.tuples(moves, st.integers(0, 3)), min_size=2, max_size=8))
    def play(steps: Any) -> None:
        crowd = Crowd(catalog, splits)
        for names, padding in steps:
            for name, _, _ in names:
                if len(crowd.running) < 5:
                    crowd.enter(name)
            crowd.step([(count, back) for _, count, back in names], padding, expected)
        while crowd.running:  # nobody is left behind, and whoever waited had its turn
            crowd.step([(6, 0)] * 5, 0, expected)
        assert not crowd.waiting
        assert crowd.gate.slots_in_use == 0
        assert not any(runs.slot.any() for stage in crowd.engine.stages for runs in stage.worker.step.runs)

    play()


def test_rows_of_others_and_padding_stay_as_they_are_to_the_bit(catalog: Catalog) -> None:
    def rows_of(made: Program | None) -> dict[str, torch.Tensor]:
        engine = engine_of(catalog)
        engine.meet("a", made, S, PROMPT)
        return engine.step([Chunk("b", 0, IDS), Chunk("a", 0, IDS), Chunk("c", 3, IDS)], padding=4)

    steered, plain = rows_of(compiled(DOCUMENTS["everywhere"], catalog)), rows_of(None)
    assert not torch.equal(steered["a"], plain["a"])
    assert torch.equal(steered["b"], plain["b"])
    assert torch.equal(steered["c"], plain["c"])


def test_a_pass_that_is_not_laid_out_is_not_edited(catalog: Catalog) -> None:
    """Warm-ups, profiling and captures run the model with as many rows as there may ever be."""
    engine = engine_of(catalog)
    made = compiled(DOCUMENTS["everywhere"], catalog)
    engine.meet("a", made, S, PROMPT)
    engine.step([Chunk("a", 0, IDS)])
    before = engine.values("a")
    worker, model = engine.stages[0].worker, engine.stages[0].model
    ids = torch.arange(40) % VOCABULARY
    with editors(worker.editors):
        hidden, residual = model(ids, torch.zeros(40, dtype=torch.int64))
    plain = LlamaForCausalLM()(ids, torch.zeros(40, dtype=torch.int64))
    assert torch.equal(hidden, plain[0])
    assert torch.equal(residual, plain[1])
    assert worker.end(None) is None
    engine.step([Chunk("a", len(IDS), [3])])
    assert engine.values("a")[TOUCHED] == before[TOUCHED] + 1


def test_a_site_that_gets_part_of_the_rows_stops_the_pass(catalog: Catalog) -> None:
    engine = engine_of(catalog)
    made = compiled(DOCUMENTS["everywhere"], catalog)
    engine.meet("a", made, S, PROMPT)
    worker, ids = engine.stages[0].worker, torch.tensor(IDS)
    worker.begin(["a"], torch.tensor([0, 12]), torch.arange(12), ids, 12)
    with editors(worker.editors), pytest.raises(RuntimeError, match="6 rows in a step of 12"):
        engine.stages[0].model(ids[:6], torch.arange(6))
