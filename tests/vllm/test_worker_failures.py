"""Beside the model nothing may be raised: who cannot be steered ends alone; slots hold what their program asks."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import RunFailed, SiteError, StartError, WidthMismatch
from sae_steer.program import Program
from sae_steer.runs import FAILED, Sums
from sae_steer.sae import open_sae
from sae_steer.sites import Site
from sae_steer.slots import Slot
from sae_steer_vllm.channel import Snapshot
from sae_steer_vllm.worker import Worker
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import FEATURES, WIDTH, compile_doc, edit, make_catalog, steering
from tests.vllm.toy import LIMITS, Chunk, Engine, LlamaForCausalLM, shape

IDS = [3, 4, 5, 6]
WHOLE, SPLIT = (range(3),), ([0], [1, 2])


def compiled(catalog: Catalog, *interventions: dict[str, object]) -> Program:
    made = compile_doc(steering(*interventions), catalog, limits=LIMITS, sites=catalog.sites())
    assert made is not None
    return made


def opened(folder: Path) -> Catalog:
    """What another process finds where :func:`make_catalog` has written."""
    return Catalog([CatalogSae.make(name, open_sae(folder / name)) for name in ("r0", "r1")])


def replaced(folder: Path) -> None:
    """The file of an open SAE is written over with that of another."""
    write_saelens(folder / "other", d_in=WIDTH, n_features=FEATURES, seed=99, hook_name="blocks.0.hook_resid_post")
    (folder / "sae_weights.safetensors").write_bytes((folder / "other" / "sae_weights.safetensors").read_bytes())


def fail(snapshot: Snapshot | None, program: Program, request: str) -> RunFailed | None:
    """What the values of a request say."""
    assert snapshot is not None
    return Sums(program, snapshot.slices()[request]).failure


# ------------------------------------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize("splits", [WHOLE, SPLIT], ids=["one", "pipeline"])
def test_a_file_that_changed_ends_that_request_alone(splits: Sequence[Sequence[int]], tmp_path: Path) -> None:
    """Also where the stage that read it is not the one that answers."""
    make_catalog(tmp_path)
    catalog = opened(tmp_path)
    engine = Engine([opened(tmp_path) for _ in splits], catalog.sites(), splits)
    good, bad = compiled(catalog, edit()), compiled(catalog, edit(sae="r0", features=[1], value=9.0), edit())
    replaced(tmp_path / "r0")
    engine.meet("good", good, Slot(0, 1), 4)
    engine.meet("bad", bad, Slot(0, 2), 4)
    engine.meet("plain", None, Slot(0, 0), 4)
    rows = engine.step([Chunk(name, 0, IDS) for name in ("bad", "plain", "good")])
    assert engine.snapshot is not None
    assert set(engine.snapshot.failed()) == {"bad"}
    assert fail(engine.snapshot, good, "good") is None
    broken = fail(engine.snapshot, bad, "bad")
    assert broken is not None
    assert broken.code == "request_failed"
    if splits is WHOLE:
        code, message = engine.snapshot.errors["bad"]
        assert code == "bad_checkpoint"
        assert "changed while it was in use" in message
    assert torch.equal(rows["bad"], rows["plain"]) or splits is SPLIT  # its answer is never seen
    assert not torch.equal(rows["good"], rows["plain"])

    engine.forget("bad")
    engine.meet("after", compiled(catalog, edit(value=7.0)), Slot(0, 2), 4)
    rows = engine.step([Chunk("after", 0, IDS), Chunk("good", 4, [7])])
    assert engine.snapshot is not None
    assert engine.snapshot.failed() == []
    assert list(engine.snapshot.slices()) == ["after", "good"]


def test_a_row_that_does_not_fit_the_model_ends_that_request_alone(tmp_path: Path) -> None:
    tensors = write_saelens(tmp_path / "a", d_in=WIDTH, n_features=FEATURES, hook_name="blocks.1.hook_resid_post")
    large = tensors["W_dec"].clone()
    large[5] = 1e6
    write_saelens(
        tmp_path / "a", d_in=WIDTH, n_features=FEATURES, hook_name="blocks.1.hook_resid_post", tensors={"W_dec": large}
    )
    catalog = Catalog([CatalogSae.make("r1", open_sae(tmp_path / "a"))])
    engine = Engine([catalog], catalog.sites(), dtype=torch.float16)
    engine.meet("bad", compiled(catalog, edit(features=[5])), Slot(0, 1), 4)
    engine.meet("good", compiled(catalog, edit(features=[4])), Slot(0, 2), 4)
    engine.step([Chunk("bad", 0, IDS), Chunk("good", 0, IDS)])
    assert engine.snapshot is not None
    assert engine.snapshot.failed() == ["bad", "bad"]
    assert engine.snapshot.errors["bad"][0] == "non_finite"
    assert "float16" in engine.snapshot.errors["bad"][1]


def test_what_failed_to_load_is_tried_again_by_the_next(tmp_path: Path) -> None:
    """The slot counts as empty: half of the program may be in it."""
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog], catalog.sites())
    program = compiled(catalog, edit(), edit(sae="r0", features=[1], value=9.0))
    file = tmp_path / "r0" / "sae_weights.safetensors"
    kept, stat = file.read_bytes(), file.stat()
    replaced(tmp_path / "r0")
    engine.meet("first", program, Slot(0, 1), 4)
    plain = engine.step([Chunk("plain", 0, IDS)])["plain"]
    assert torch.equal(engine.step([Chunk("first", 0, IDS)])["first"], plain)
    file.write_bytes(kept)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    engine.meet("second", program, Slot(0, 1), 4)
    assert not torch.equal(engine.step([Chunk("second", 0, IDS)])["second"], plain)


def test_a_program_is_not_taken_for_loaded_where_another_began_to_overwrite_it(tmp_path: Path) -> None:
    make_catalog(tmp_path)
    catalog = opened(tmp_path)
    engine = Engine([catalog], catalog.sites())
    first = compiled(catalog, edit(sae="r0", features=[1], value=9.0))
    other = compiled(catalog, edit(sae="r0", features=[2], value=-9.0), edit())
    engine.meet("a", first, Slot(0, 1), 4)
    expected = engine.step([Chunk("a", 0, IDS)])["a"]
    engine.forget("a")
    replaced(tmp_path / "r1")  # what the other asks of r0 can be read, and is written first
    engine.meet("b", other, Slot(0, 1), 4)
    engine.step([Chunk("b", 0, IDS)])
    assert engine.snapshot is not None
    assert "b" in engine.snapshot.errors
    engine.forget("b")
    engine.meet("c", first, Slot(0, 1), 4)
    assert torch.equal(engine.step([Chunk("c", 0, IDS)])["c"], expected)


def test_what_another_process_cannot_load_is_steered_by_none(tmp_path: Path) -> None:
    """Copies of one residual stream must not part."""
    catalog = make_catalog(tmp_path)
    asked, others = [], [False]

    def agree(yes: bool) -> bool:
        asked.append(yes)
        return yes and others[0]

    engine = Engine([catalog], catalog.sites(), agree=agree)
    program = compiled(catalog, edit(value=9.0))
    engine.meet("a", program, Slot(0, 1), 4)
    stepped = engine.step([Chunk("a", 0, IDS), Chunk("plain", 0, IDS)])
    assert torch.equal(stepped["a"], stepped["plain"])
    assert engine.snapshot is not None
    assert engine.snapshot.errors["a"][0] == "request_failed"
    assert "Another process" in engine.snapshot.errors["a"][1]
    engine.forget("a")
    others[0] = True
    for name in ("b", "c"):  # the second finds the slot as the first has filled it, here as everywhere
        engine.meet(name, program, Slot(0, 1), 4)
    stepped = engine.step([Chunk("b", 0, IDS), Chunk("plain", 0, IDS)])
    assert not torch.equal(stepped["b"], stepped["plain"])
    assert asked == [True, True]


def test_a_dose_that_is_passed_ends_that_request_alone(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    for splits in (WHOLE, SPLIT):
        engine = Engine([catalog] * len(splits), catalog.sites(), splits)
        limited = compile_doc(steering(edit(sae="r0", features=[1], value=90.0), dose={"limit": 0.1}), catalog)
        assert limited is not None
        engine.meet("over", limited, Slot(0, 1), 4)
        engine.meet("good", compiled(catalog, edit()), Slot(0, 2), 4)
        engine.step([Chunk("over", 0, IDS), Chunk("good", 0, IDS)])
        assert engine.snapshot is not None
        assert engine.snapshot.failed() == ["over"]
        failure = fail(engine.snapshot, limited, "over")
        assert failure is not None
        assert failure.code == "dose_exceeded"
        assert "resid_post.0" in failure.message


# ------------------------------------------------------------------------------------------- slots


def test_a_slot_is_filled_again_while_its_program_does_not_run(tmp_path: Path) -> None:
    """What the last program did at other sites, with more rows, and to token ids is gone."""
    catalog = make_catalog(tmp_path)
    first = compiled(catalog, edit(features=[1, 2, 3], when={"token_in": [3]}), edit(sae="r0", features=[1], value=9.0))
    second = compiled(catalog, edit(sae="tc", features=[4], value=3.0))

    def last_of(*programs: Program) -> torch.Tensor:
        engine = Engine([catalog], catalog.sites())
        rows: dict[str, torch.Tensor] = {}
        for number, program in enumerate(programs):
            engine.meet(str(number), program, Slot(0, 1), 4)
            rows = engine.step([Chunk(str(number), 0, IDS)])
            engine.forget(str(number))
        return rows[str(len(programs) - 1)]

    assert torch.equal(last_of(first, second), last_of(second))
    assert torch.equal(last_of(second, first), last_of(first))
    assert torch.equal(last_of(second, first, second), last_of(second))
    assert not torch.equal(last_of(first), last_of(second))


def test_equal_programs_share_a_slot_and_not_their_sums(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog], catalog.sites())
    program = compiled(catalog, edit(positions="completion"))
    engine.meet("a", program, Slot(0, 1), 2)
    engine.meet("b", program, Slot(0, 1), 4)
    engine.step([Chunk("a", 0, IDS), Chunk("b", 0, IDS)])
    assert engine.snapshot is not None
    touched = {name: Sums(program, values).touched for name, values in engine.snapshot.slices().items()}
    assert touched == {"a": 3, "b": 1}


def test_one_that_is_met_again_after_a_preemption_keeps_its_sums(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog], catalog.sites())
    program = compiled(catalog, edit())
    engine.meet("a", program, Slot(0, 1), 4)
    engine.step([Chunk("a", 0, IDS)])
    engine.meet("a", program, Slot(0, 1), 6)  # vLLM's newer runner tells of it anew, with what it has said by then
    engine.step([Chunk("a", 0, [*IDS, 7])])
    assert engine.snapshot is not None
    assert Sums(program, engine.snapshot.slices()["a"]).touched == 5


def test_forgetting_is_of_those_alone_and_of_anybody(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog], catalog.sites())
    program = compiled(catalog, edit())
    plain = engine.step([Chunk("a", 0, IDS)])["a"]
    assert engine.snapshot is None
    for name in ("a", "b"):
        engine.meet(name, program, Slot(0, 1), 4)
    engine.forget("a", "nobody")
    rows = engine.step([Chunk("a", 0, IDS), Chunk("b", 0, IDS)])
    assert torch.equal(rows["a"], plain)
    assert not torch.equal(rows["b"], plain)
    assert engine.snapshot is not None
    assert list(engine.snapshot.slices()) == ["b"]
    engine.forget("b")
    engine.step([Chunk("b", 4, [7])])
    assert engine.snapshot is None


def test_a_name_that_comes_back_is_a_new_request(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog], catalog.sites())
    one, other = compiled(catalog, edit()), compiled(catalog, edit(value=9.0))
    engine.meet("a", one, Slot(0, 1), 4)
    engine.step([Chunk("a", 0, IDS)])
    engine.forget("a")
    engine.meet("a", other, Slot(0, 2), 4)
    engine.step([Chunk("a", 0, [3])])
    assert engine.snapshot is not None
    sums = Sums(other, engine.snapshot.slices()["a"])
    assert (sums.touched, sums.tallies()[0].after.tolist()) == (1, [9.0])


# ------------------------------------------------------------------------------------------- starting


def test_what_a_worker_says_of_itself(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog] * 2, catalog.sites(), SPLIT)
    first, last = (stage.worker.describe() for stage in engine.stages)
    assert first["saes"] == last["saes"] == {name: entry.sae.fingerprint for name, entry in catalog.saes.items()}
    assert first["vectors"] == {name: vector.fingerprint for name, vector in catalog.vectors.items()}
    assert first["sites"] == ["resid_post.0"]
    assert last["sites"] == ["resid_post.1", "mlp_in.2->mlp_out.2"]
    alone = Engine([catalog], catalog.sites()).stages[0].worker
    assert alone.describe()["bytes"] > last["bytes"] > first["bytes"] > 0


def test_what_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path)
    with pytest.raises(WidthMismatch, match="width 16"):
        Worker(LlamaForCausalLM(), catalog, LIMITS, catalog.sites(), shape(hidden=24))
    with pytest.raises(SiteError, match=r"no resid_post\.3"):
        Worker(LlamaForCausalLM(), catalog, LIMITS, catalog.sites([Site.parse("resid_post.3")]), shape())
    across = [Site.parse("mlp_in.0->mlp_out.1")]
    with pytest.raises(SiteError, match="different stages"):
        Worker(LlamaForCausalLM([0]), Catalog([]), LIMITS, across, shape())
    with pytest.raises(StartError):
        Worker(torch.nn.Linear(2, 2), catalog, LIMITS, catalog.sites(), shape())


@pytest.mark.parametrize("name", ["z.1", "z.0->resid_post.1"])
def test_no_process_of_several_sees_all_heads(name: str) -> None:
    sites = [Site.parse(name)]
    Worker(LlamaForCausalLM(), Catalog([]), LIMITS, sites, shape(ranks=1))
    with pytest.raises(SiteError, match="tensor-parallel-size 1"):
        Worker(LlamaForCausalLM(), Catalog([]), LIMITS, sites, shape(ranks=2))


def test_values_are_float64_and_whole(tmp_path: Path) -> None:
    """Counts of long requests stay exact."""
    catalog = make_catalog(tmp_path)
    engine = Engine([catalog], catalog.sites())
    program = compiled(catalog, edit())
    engine.meet("a", program, Slot(0, 1), 4)
    engine.step([Chunk("a", 0, IDS)])
    assert engine.snapshot is not None
    values = engine.snapshot.slices()["a"]
    assert values.dtype == np.float64
    assert values[FAILED] == 0
