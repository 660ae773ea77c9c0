"""What the requests of a batch read on a worker: each its own, however it is cut, and through however little memory."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sae_steer.capabilities import Capabilities
from sae_steer.catalog import Catalog
from sae_steer.errors import NonFinite
from sae_steer.program import Program
from sae_steer.read_rows import Floats, layout
from sae_steer.read_store import ReadStore
from sae_steer.readings import NOT_FINITE
from sae_steer.readout import ReadoutSpace
from sae_steer.reference import encode
from sae_steer.slots import Slot
from sae_steer_vllm.worker_reads import ReadPlan, ReadRun
from tests.sae_steer.helpers import FEATURES, WIDTH, Json, compile_doc, edit, make_catalog
from tests.vllm.toy import LIMITS, Chunk, Engine, Layer, LlamaForCausalLM

IDS = list(range(2, 14))
PROMPT = 5
DOCUMENTS: dict[str, Json] = {
    "named": {"readings": [{"sae": "r1", "features": [9, 3], "positions": "all"}]},
    "largest": {"readings": [{"sae": "w1", "features": [2], "top_k": 4, "positions": {"ranges": [[1, 4], [7, 30]]}}]},
    "two places": {
        "readings": [{"sae": "r0", "features": [1, 2, 4, 6], "positions": "all"}, {"sae": "w1", "top_k": 2}],
        "on": [{"sae": "r1", "feature": 8, "above": 0.5, "action": "flag"}],
    },
    "after": {
        "interventions": [edit(features=[3, 4], value=6.0), edit(sae="w1", features=[5, 1], value=40.0)],
        "readings": [
            {"sae": "w1", "features": [1], "top_k": 3, "positions": "all", "at": "after"},
            {"sae": "r1", "features": [4, 7], "positions": "all", "at": "before"},
        ],
    },
}
SLOTS = {"named": Slot(0, 1), "largest": Slot(0, 2), "two places": Slot(1, 1), "after": Slot(1, 1)}
"""Two share each bucket, the last two one after the other."""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"), profiles=False)


def compiled(name: str, catalog: Catalog) -> Program:
    program = compile_doc(DOCUMENTS[name], catalog, capabilities=Capabilities("toy", ()), limits=LIMITS)
    assert program is not None
    assert (program.rows > LIMITS.rows) == SLOTS[name].bucket
    return program


def engine_of(catalog: Catalog, splits: Sequence[Sequence[int]] = (range(3),), *, narrow: bool = False) -> Engine:
    """An engine; a narrow one has memory for a few numbers, and must hand over in the middle of a site."""
    engine = Engine([catalog] * len(splits), catalog.sites(()), splits)
    for stage in engine.stages:
        if narrow:
            stage.worker.step._store = ReadStore(widest=LIMITS.wide_rows, device=torch.device("cpu"), floats=8)
            shapes = [(FEATURES, WIDTH)]
            stage.worker._space = ReadoutSpace(shapes, usual_k=2, most_k=FEATURES, device=torch.device("cpu"), tokens=3)
    return engine


def reads_of(engine: Engine, name: str) -> Floats:
    assert engine.snapshot is not None
    return engine.snapshot.reads.get(name, np.zeros((0, 0)))


def alone(catalog: Catalog, name: str) -> Floats:
    """A request's rows, where nothing else is there and it is computed in one step."""
    engine = engine_of(catalog)
    engine.meet(name, compiled(name, catalog), SLOTS[name], PROMPT)
    engine.step([Chunk(name, 0, IDS)])
    return reads_of(engine, name)


STEPS = [
    {"named": 3, "two places": 12, None: 4},
    {"largest": 5, "named": 4},
    {None: 2, "named": 5, "largest": 7},
    {"after": 8},
    {None: 1, "after": 4},
]
"""How many tokens of each request a step computes; None = one that nobody steers."""


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("splits", [(range(3),), (range(1), range(1, 3))], ids=["one stage", "two"])
def test_every_request_reads_as_if_it_were_alone(
    catalog: Catalog, splits: Sequence[Sequence[int]], narrow: bool
) -> None:
    engine = engine_of(catalog, splits, narrow=narrow)
    done: dict[str | None, int] = {}
    found: dict[str, list[Floats]] = {}
    for step in STEPS:
        chunks = []
        for name, count in step.items():
            start = done.get(name, 0)
            done[name] = start + count
            chunks.append(Chunk(name or "plain", start, (IDS * 2)[start : start + count]))
            if name is not None and not start:
                if name == "after":
                    engine.forget("two places")
                engine.meet(name, compiled(name, catalog), SLOTS[name], PROMPT)
        engine.step(chunks, padding=2)
        for name in step:
            if name is not None and len(reads_of(engine, name)):
                found.setdefault(name, []).append(reads_of(engine, name))
    assert found.keys() == DOCUMENTS.keys()
    for name, parts in found.items():
        assert len(parts) > 1 or name in ("two places", "largest")
        want = alone(catalog, name)
        np.testing.assert_allclose(np.concatenate(parts), want, rtol=1e-5, atol=1e-6)


def streams(layers: int) -> torch.Tensor:
    """The residual stream ``[T, D]`` behind so many layers, where nobody steers, in float64."""
    model = LlamaForCausalLM(dtype=torch.float64)
    with torch.no_grad():
        x = model.model.embed_tokens(torch.tensor(IDS))
        for layer in [each for each in model.model.layers if isinstance(each, Layer)][:layers]:
            x = x + layer.self_attn(x / x.norm(dim=-1, keepdim=True))
            x = x + layer.mlp(x / x.norm(dim=-1, keepdim=True))
    return x


def test_what_is_read_is_what_the_definition_says(catalog: Catalog) -> None:
    found = alone(catalog, "two places")
    first, second = streams(1), streams(2)
    program = compiled("two places", catalog)
    [named, largest], triggers, _ = layout(program)
    assert found[:, 0].tolist() == list(range(len(IDS)))
    assert found[:, 1].tolist() == IDS
    rows = found[:, 2:]
    for position in range(len(IDS)):
        f = encode(catalog.sae("r0").sae, first[position])
        assert rows[position, named.values] == pytest.approx([float(f[i]) for i in (1, 2, 4, 6)], abs=1e-4)
        if position < PROMPT - 1:
            continue
        f = encode(catalog.sae("w1").sae, second[position])
        best = sorted(range(FEATURES), key=lambda i, f=f: -float(f[i]))[:2]
        assert rows[position, largest.ids].tolist() == best
        assert rows[position, largest.top] == pytest.approx([float(f[i]) for i in best], abs=1e-4)
        f = encode(catalog.sae("r1").sae, second[position])
        assert rows[position, triggers] == pytest.approx([float(f[8])], abs=1e-4)


def test_no_more_rows_are_gathered_than_somebody_reads(catalog: Catalog) -> None:
    """Of a bucket, the rows of all of its readers; columns are for these alone."""
    sites = catalog.sites(())
    programs = {name: compiled(name, catalog) for name in DOCUMENTS}
    runs = [ReadRun(name, i, program, SLOTS[name].bucket, PROMPT) for i, (name, program) in enumerate(programs.items())]
    features = {entry.sae.fingerprint: FEATURES for entry in catalog.saes.values()}
    plan = ReadPlan.make(runs, sites, features, len(runs), torch.device("cpu"))
    assert plan is not None
    at = sites.index(catalog.sae("r1").site)
    assert plan.gathers[0, at, False].tolist() == [0, 1], "of 'named' both, of 'largest' its one"
    assert (0, at, True) not in plan.gathers
    # 'after' edits two of r1 and reads one of them, and another, before the edits; of w1 it needs what it edits, after.
    rows = next(part.rows for part in programs["after"].sites if part.site == catalog.sae("r1").site)
    alone = ReadPlan.make(runs[3:], sites, features, 4, torch.device("cpu"))
    assert alone is not None
    wanted = {False: ("r1", {4, 7}), True: ("w1", {1, 5})}
    for after, (name, numbers) in wanted.items():
        own = [(rows[i].source, rows[i].feature) for i in alone.gathers[1, at, after].tolist()]
        assert sorted(own) == sorted((catalog.sae(name).sae.fingerprint, n) for n in numbers)


def test_the_memory_is_there_from_the_start(catalog: Catalog) -> None:
    """An engine measures what it needs without any request; so nothing may be added by requests that read."""
    engine = engine_of(catalog)
    [stage] = engine.stages
    worker = stage.worker
    assert worker._space is not None
    before = worker.nbytes
    assert before > worker._space.nbytes + worker.step._store.nbytes
    held = [t for part in (worker._space, worker.step._store) for t in vars(part).values() if torch.is_tensor(t)]
    places = [(t.data_ptr(), t.shape) for t in held]
    for name in DOCUMENTS:
        engine.forget(*DOCUMENTS)
        engine.meet(name, compiled(name, catalog), SLOTS[name], PROMPT)
        engine.step([Chunk(name, 0, IDS)])
    assert worker.nbytes == before
    now = [t for part in (worker._space, worker.step._store) for t in vars(part).values() if torch.is_tensor(t)]
    assert [(t.data_ptr(), t.shape) for t in now] == places


@pytest.mark.parametrize("at", ["before", "after"])
def test_the_largest_of_a_token_that_is_not_finite_end_its_request_alone(catalog: Catalog, at: str) -> None:
    document = {
        "interventions": [edit(sae="w1", features=[5, 1], value=40.0)],
        "readings": [{"sae": "w1", "top_k": 3, "positions": "all", "at": at}],
    }
    program = compile_doc(document, catalog, capabilities=Capabilities("toy", ()), limits=LIMITS)
    assert program is not None
    engine = engine_of(catalog)
    [stage] = engine.stages
    with torch.no_grad():
        stage.model.model.embed_tokens.weight[IDS[3]] = torch.nan
    sound = [token for token in IDS if token != IDS[3]]
    for name in ("broken", "sound"):
        engine.meet(name, program, Slot(0, 1), PROMPT)
    engine.step([Chunk("broken", 0, IDS), Chunk("sound", 0, sound)])
    assert engine.snapshot is not None
    assert engine.snapshot.errors == {"broken": (NonFinite.code, NOT_FINITE)}
    assert engine.snapshot.reads.keys() == {"sound"}
