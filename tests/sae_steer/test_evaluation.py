"""The parts of an evaluation: measurements against a loop, lines between points, samples of texts, and the journal."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sae_steer
from sae_steer.calibration.store import StoredCalibration
from sae_steer.errors import DataError, StartError, UnknownName
from sae_steer.evaluation.curves import Summary, at_drop, interval, samples, summary, whole
from sae_steer.evaluation.journal import Journal
from sae_steer.evaluation.measure import Bench, Measured
from sae_steer.evaluation.methods import NAMES, Method, methods
from sae_steer.evaluation.readout import Probe, Seen
from sae_steer.evaluation.result import Claim
from sae_steer.evaluation.suppression import Sum, Sums
from sae_steer.evaluation.texts import Texts
from sae_steer.inprocess import Steer
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import HIDDEN, VOCABULARY, make_catalog, tiny_model

# ------------------------------------------------------------------------------------------- measurements


@pytest.fixture(scope="module")
def steer(tmp_path_factory: pytest.TempPathFactory) -> Steer:
    folder = tmp_path_factory.mktemp("sae") / "res"
    write_saelens(folder, hook_name="blocks.1.hook_resid_post", d_in=HIDDEN, n_features=32, seed=4)
    return sae_steer.attach(tiny_model(), {"res": folder})


def texts(seed: int, count: int, labels: int = 1) -> Texts:
    rng = np.random.default_rng(seed)
    ids = tuple(tuple(rng.integers(3, VOCABULARY, size=size).tolist()) for size in rng.integers(2, 12, size=count))
    return Texts(ids, tuple(int(label) for label in rng.integers(labels, size=count)))


def bench(steer: Steer, batch_tokens: int = 64) -> Bench:
    complement = dataclasses.replace(texts(2, 9), labels=(1,) * 9)
    return Bench(steer, texts(1, 7), complement, texts(3, 8), concept=0, words=(5, 6), batch_tokens=batch_tokens)


def probe(steer: Steer) -> Probe:
    train = texts(4, 30, labels=2)
    return Probe.fit(bench(steer).see(train).pooled, train.labels, count=2, seed=0)


CLAMP = {"interventions": [{"sae": "res", "features": [3, 4], "op": "clamp", "value": 6.0}]}


@torch.no_grad()
def one_by_one(steer: Steer, ids: tuple[int, ...], request: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean final hidden state ``[D]`` and log-probabilities ``[T, V]`` of one text alone, in float64."""
    tokens = torch.tensor([ids])
    with steer.rows([request], prompt_lengths=[len(ids)]):  # type: ignore[list-item]
        out = steer.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0].double().mean(dim=0), out.logits[0].double().log_softmax(dim=-1)


def test_measurements_are_those_of_one_text_at_a_time(steer: Steer) -> None:
    here, reads = bench(steer), probe(steer)
    found = here.measure(CLAMP, [reads])
    for row, ids in enumerate(here.plain.ids):
        log = one_by_one(steer, ids, CLAMP)[1]
        expected = -sum(float(log[t, ids[t + 1]]) for t in range(len(ids) - 1))
        assert found.loss[row] == pytest.approx(expected, rel=1e-4)
        assert found.loss_tokens[row] == len(ids) - 1
    for row, ids in enumerate(here.complement.ids):
        hidden, log = one_by_one(steer, ids, CLAMP)
        plain = one_by_one(steer, ids, None)[1]
        assert found.divergence[row] == pytest.approx(float((plain.exp() * (plain - log)).sum()), rel=1e-3, abs=1e-5)
        own = reads.probabilities(Seen(hidden[None].numpy(), None))[0, 1]
        assert found.complement[0, row] == pytest.approx(own, abs=1e-4)
    for row, ids in enumerate(here.target.ids):
        own = reads.probabilities(Seen(one_by_one(steer, ids, CLAMP)[0][None].numpy(), None))[0]
        assert found.target[0, row] == pytest.approx(own[0], abs=1e-4)
        assert found.target_right[0, row] == float(own.argmax() == 0)


def test_nothing_asked_moves_nothing(steer: Steer) -> None:
    found = bench(steer).measure(None, [probe(steer)])
    assert float(np.abs(found.divergence).max()) == 0.0


def test_batches_make_no_difference(steer: Steer) -> None:
    reads = [probe(steer)]
    small, large = (bench(steer, tokens).measure(CLAMP, reads) for tokens in (1, 4096))
    for name in Measured.__dataclass_fields__:
        np.testing.assert_allclose(getattr(small, name), getattr(large, name), rtol=2e-4, atol=1e-5)


def test_progress_is_told_of_every_token(steer: Steer) -> None:
    told: list[int] = []
    here = bench(steer)
    here.measure(CLAMP, [probe(steer)], told.append)
    assert sum(told) == here.tokens


def test_words_are_the_models_own_answer(steer: Steer) -> None:
    here = bench(steer)
    seen = here.see(here.target)
    assert seen.words is not None
    for row, ids in enumerate(here.target.ids):
        last = one_by_one(steer, ids, None)[1][-1].exp()
        np.testing.assert_allclose(seen.words[row], last[[5, 6]].numpy(), atol=1e-5)


def test_the_last_token_is_the_texts_own(steer: Steer) -> None:
    here = dataclasses.replace(bench(steer), pool="last")
    ids = here.target.ids[0]
    with torch.no_grad():
        alone = steer.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    np.testing.assert_allclose(here.see(here.target).pooled[0], alone.numpy(), atol=1e-4)


def test_measurements_survive_the_journal(steer: Steer) -> None:
    found = bench(steer).measure(CLAMP, [probe(steer)])
    back = Measured.of_json(json.loads(json.dumps(found.to_json())))
    for name in Measured.__dataclass_fields__:
        np.testing.assert_allclose(getattr(back, name), getattr(found, name), rtol=1e-8)


def test_a_label_without_training_text_is_refused() -> None:
    with pytest.raises(DataError, match="label number 2"):
        Probe.fit(np.zeros((4, 3)), [0, 1, 0, 1], count=3, seed=0)


# ------------------------------------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredCalibration:
    return make_catalog(tmp_path_factory.mktemp("catalog")).calibration("cal", param="")


def compared(stored: StoredCalibration, **more: object) -> list[Method]:
    return methods(stored, sae="r1", calibration="cal", concept="rude", **more)  # type: ignore[arg-type]


def test_every_setting_of_every_method_is_a_request(
    stored: StoredCalibration, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.sae_steer.helpers import compile_doc

    catalog = make_catalog(tmp_path_factory.mktemp("again"))
    found = compared(stored)
    assert [method.name for method in found] == list(NAMES)
    for method in found:
        digests = set()
        for setting in (*method.grid, *method.defaults):
            program = compile_doc(method.request(setting), catalog)
            assert program is not None
            digests.add(program.digest)
        assert len(digests) > len(method.grid) / 2
        places = [method.place(setting) for setting in method.grid]
        assert places == sorted(places)
        assert min(places) > 0


def test_aura_in_full_is_the_servers_own(stored: StoredCalibration, tmp_path: Path) -> None:
    from tests.sae_steer.helpers import program

    catalog = make_catalog(tmp_path)
    [aura] = compared(stored, names=["aura"])
    mixed, whole_ = (program(*aura.request(share)["interventions"], catalog=catalog) for share in (1.0 + 1e-12, 1.0))
    mine, theirs = ([row.scale for row in p.sites[0].rows] for p in (mixed, whole_))
    assert mine == pytest.approx(theirs)


def test_unknown_methods_and_concepts(stored: StoredCalibration) -> None:
    with pytest.raises(StartError, match="lobotomy"):
        compared(stored, names=["lobotomy"])
    with pytest.raises(UnknownName, match="rude, sad, calm"):
        methods(stored, sae="r1", calibration="cal", concept="merry")


# ------------------------------------------------------------------------------------------- curves

PLAIN = Summary(1.0, 0.9, 1.0, 0.9, 10.0, 0.0)


def point(confidence: float, perplexity: float) -> Summary:
    return Summary(confidence, confidence, 0.9, 0.9, perplexity, 10 * (0.9 - confidence))


def knob(name: str = "app", grid: tuple[float, ...] = (1.0, 2.0, 4.0), off: float = 0.0) -> Method:
    return Method(name, "strength", (grid[-1],), off, grid, lambda setting: {"at": setting})


def test_between_two_points_is_a_straight_line() -> None:
    points = {1.0: point(0.7, 11.0), 2.0: point(0.5, 12.0), 4.0: point(0.3, 20.0)}
    found = at_drop(knob(), points, PLAIN, 0.5)
    assert found is not None
    assert found.setting == pytest.approx(3.0)
    assert found.summary.target_confidence == pytest.approx(0.4)
    assert found.summary.perplexity == pytest.approx(16.0)
    first = at_drop(knob(), points, PLAIN, 0.1)
    assert first is not None
    assert (first.setting, first.summary.perplexity) == pytest.approx((0.5, 10.5))


def test_what_is_not_reached_is_said() -> None:
    assert at_drop(knob(), {1.0: point(0.7, 11.0)}, PLAIN, 0.3) is None


def test_the_mildest_place_counts() -> None:
    points = {1.0: point(0.5, 11.0), 2.0: point(0.8, 12.0), 4.0: point(0.3, 20.0)}
    found = at_drop(knob(), points, PLAIN, 0.4)
    assert found is not None
    assert found.setting == pytest.approx(1.0)


def test_a_falling_knob() -> None:
    points = {0.75: point(0.7, 11.0), 0.25: point(0.3, 12.0)}
    found = at_drop(knob(grid=(0.75, 0.25), off=1.0), points, PLAIN, 0.4)
    assert found is not None
    assert found.setting == pytest.approx(0.5)


@given(st.lists(st.floats(0.0, 0.9), min_size=1, max_size=6), st.floats(0.001, 0.9))
def test_a_match_is_a_match(confidences: list[float], drop: float) -> None:
    points = {float(n + 1): point(c, 10.0 + n) for n, c in enumerate(confidences)}
    found = at_drop(knob(), points, PLAIN, drop)
    if found is None:
        assert all(0.9 - c < drop for c in confidences)
    else:
        assert found.summary.target_confidence == pytest.approx(0.9 - drop, abs=1e-9)


def test_samples_of_texts_are_drawn_with_replacement_and_from_all_readouts() -> None:
    rng = np.random.default_rng(0)
    ones = np.ones
    measured = Measured(
        rng.random((3, 20)), ones((3, 20)), rng.random((3, 30)), ones((3, 30)), rng.random(30), ones(30) * 4,
        rng.random(10) * 20, ones(10) * 7,
    )  # fmt: skip
    everything = summary(measured, whole(measured))
    assert everything.target_confidence == pytest.approx(measured.target.mean())
    assert everything.perplexity == pytest.approx(math.exp(measured.loss.sum() / 70))
    assert everything.divergence == pytest.approx(measured.divergence.sum() / 120)
    drawn = list(samples(measured, 400, seed=1))
    assert {sample.readout for sample in drawn} == {0, 1, 2}
    values = [summary(measured, sample).target_confidence for sample in drawn]
    found = interval(values)
    assert found is not None
    assert found[0] < everything.target_confidence < found[1]
    spread = float(measured.target.std()) / math.sqrt(20)
    assert 2 * spread < found[1] - found[0] < 6 * spread
    again = [summary(measured, sample).target_confidence for sample in samples(measured, 400, seed=1)]
    assert values == again


# ------------------------------------------------------------------------------------------- the claim


def claim(app: list[float], rival: list[float]) -> Claim:
    """Of perplexities at a confidence of 0.5; the first is over all texts, the others are samples."""
    both = knob("full-mask"), knob("app")
    sums = [
        Sum(PLAIN, {"full-mask": {4.0: point(0.1, 2 * b - 10)}, "app": {4.0: point(0.1, 2 * a - 10)}})
        for a, b in zip(app, rival, strict=True)
    ]
    return Sums(both, sums).claim([0.5])


def test_the_claim_holds_where_no_sample_says_otherwise() -> None:
    assert claim([11.0] * 5, [12.0, 12.1, 12.2, 12.3, 12.4]).claim == "holds"


def test_the_claim_does_not_hold_where_a_rival_is_better_or_may_be() -> None:
    worse = claim([13.0] * 5, [12.0, 12.1, 12.2, 12.3, 12.4])
    assert worse.claim == "does not"
    assert "larger than that of full-mask" in worse.because
    unsure = claim([11.0] * 5, [12.0, 10.0, 10.5, 12.0, 13.0])
    assert unsure.claim == "does not"
    assert "not clearly below" in unsure.because
    assert unsure.differences[0].value < 0


# ------------------------------------------------------------------------------------------- the journal


def test_a_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out" / "journal.jsonl"
    first = Journal(path, "one")
    first.append({"n": 1})
    first.append({"n": 2})
    assert list(Journal(path, "one")) == [{"n": 1}, {"n": 2}]
    with pytest.raises(DataError, match="other settings"):
        Journal(path, "another")


def test_what_a_kill_left_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "one").append({"n": 1})
    whole_ = path.read_bytes()
    for cut in range(len(whole_)):
        path.write_bytes(whole_[:cut])
        again = Journal(path, "one")
        assert list(again) == []
        again.append({"n": 2})
        assert list(Journal(path, "one")) == [{"n": 2}]
    path.write_bytes(whole_ + b'{"n": 3, "x')
    again = Journal(path, "one")
    again.append({"n": 4})
    assert list(Journal(path, "one")) == [{"n": 1}, {"n": 4}]


def test_a_journal_in_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used"):
        Journal(tmp_path / "file" / "journal.jsonl", "one")
