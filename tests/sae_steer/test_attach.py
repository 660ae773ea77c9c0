"""Steering in process: one request a row, whatever generation does with the batch, and all slots free afterwards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sae_steer
from sae_steer import Limits
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import (
    DoseExceeded,
    LimitExceeded,
    NonFinite,
    RequestError,
    SchemaError,
    StartError,
    SteerError,
    Unsupported,
    WidthMismatch,
)
from sae_steer.inprocess import Steer
from sae_steer.reference import encode
from sae_steer.sae import Sae, open_sae
from sae_steer.sites import Site
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import FEATURES, HIDDEN, Json, edit, steering, tiny_model, vector_edit

SITE = "resid_post.1"
NEW = 6
LONG = [1, 17, 33, 4, 9, 60, 12]
SHORT = [1, 5, 41, 22]
CLAMP = steering(edit(sae="res", features=[3, 4], value=9.0))
PUSH = steering(vector_edit(value=30.0))
COMPLETION = steering(vector_edit(value=30.0, positions="completion"))
PROMPT = steering(vector_edit(value=30.0, positions="prompt"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Sae:
    folder = tmp_path_factory.mktemp("sae")
    write_saelens(folder, d_in=HIDDEN, hook_name="blocks.1.hook_resid_post", seed=3)
    return open_sae(folder)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {"v": torch.randn(HIDDEN, generator=generator), "huge": torch.full((HIDDEN,), 1e38)}


@pytest.fixture
def steer(model: PreTrainedModel, sae: Sae, vectors: dict[str, Tensor]) -> Iterator[Steer]:
    with sae_steer.attach(model, {"res": sae}, vectors=vectors, limits=Limits(max_programs=4, wide_programs=1)) as it:
        yield it
        assert it.runtime.slots_in_use == 0


def batch(*rows: list[int], side: str = "left") -> dict[str, Tensor]:
    """Input ids and mask, padded with 0."""
    width = max(map(len, rows))
    padded, mask = [], []
    for row in rows:
        pad = width - len(row)
        padded.append([0] * pad + row if side == "left" else row + [0] * pad)
        mask.append([0] * pad + [1] * len(row) if side == "left" else [1] * len(row) + [0] * pad)
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """Greedy, of a fixed length, with the scores."""
    arguments: Json = {
        "do_sample": False,
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(**inputs, **(arguments | kwargs))


def completions(out: Any, prompt: int) -> list[list[int]]:
    return out.sequences[:, prompt:].tolist()


def alone(steer: Steer, row: list[int], request: Any, **kwargs: Any) -> tuple[list[int], Any]:
    """The completion and the report of one row on its own."""
    with steer.rows([request]) as rows:
        out = generate(steer.model, batch(row), **kwargs)
    return completions(out, len(row))[0], rows.reports()[0]


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).logits


def same_report(one: Json | None, other: Json | None) -> None:
    """Counts exactly, means and doses as closely as float32 sums over other batches are."""
    assert one is not None
    assert other is not None
    assert one["features"] == [
        entry | {name: pytest.approx(entry[name], abs=1e-3, rel=1e-3) for name in ("mean_before", "mean_after")}
        for entry in other["features"]
    ]
    assert {k: one[k] for k in ("sites", "tokens", "fired")} == {k: other[k] for k in ("sites", "tokens", "fired")}
    assert one["dose"] == pytest.approx(other["dose"], abs=1e-3, rel=1e-3)


# ------------------------------------------------------------------------------------------- rows


def test_a_row_without_a_request_is_as_without_the_plugin_to_the_bit(steer: Steer) -> None:
    inputs = batch(LONG, SHORT, LONG)
    plain = generate(steer.model, inputs)
    with steer.rows([None, CLAMP, PUSH]) as rows:
        steered = generate(steer.model, inputs)
    for step, (before, after) in enumerate(zip(plain.logits, steered.logits, strict=True)):
        assert torch.equal(before[0], after[0]), step
    assert steered.sequences[0].tolist() == plain.sequences[0].tolist()
    assert rows.reports()[0] is None
    for row in (1, 2):
        assert not torch.equal(plain.logits[0][row], steered.logits[0][row])


def test_left_padding_does_not_move_positions(steer: Steer) -> None:
    for request in (CLAMP, PUSH, COMPLETION, PROMPT):
        with steer.rows([request, request]) as rows:
            out = generate(steer.model, batch(LONG, SHORT))
        for row, ids in enumerate((LONG, SHORT)):
            completion, report = alone(steer, ids, request)
            assert completions(out, len(LONG))[row] == completion
            same_report(rows.reports()[row], report)


def test_right_padding_in_a_plain_forward_pass(steer: Steer) -> None:
    for request in (CLAMP, PUSH, COMPLETION, PROMPT):
        inputs = batch(LONG, SHORT, side="right")
        with steer.rows([request, request]) as rows:
            out = logits(steer.model, inputs)
        for row, ids in enumerate((LONG, SHORT)):
            with steer.rows([request]) as single:
                expected = logits(steer.model, batch(ids))
            torch.testing.assert_close(out[row, : len(ids)], expected[0], atol=1e-3, rtol=1e-3)
            same_report(rows.reports()[row], single.reports()[0])


@pytest.mark.parametrize(
    ("request_", "edited"),
    [
        (PUSH, len(LONG) + NEW - 1),
        (PROMPT, len(LONG) - 1),
        (COMPLETION, NEW),
        (steering(vector_edit(positions={"ranges": [[2, 4], [len(LONG), len(LONG) + 2]]})), 4),
        (steering(vector_edit(skip_bos=True)), len(LONG) + NEW - 2),
        (steering(vector_edit(when={"token_in": [17, 60]}, positions="prompt")), 2),
    ],
    ids=["all", "prompt", "completion", "ranges", "skip_bos", "token_in"],
)
def test_how_many_positions_are_edited(steer: Steer, request_: Json, edited: int) -> None:
    """The last token is never computed, so P + NEW - 1 positions are."""
    _, report = alone(steer, LONG, request_)
    assert report["tokens"] == edited
    assert report["features"][0]["tokens"] == edited


def test_prompt_edits_end_before_the_last_prompt_token(steer: Steer) -> None:
    plain = logits(steer.model, batch(LONG))
    with steer.rows([COMPLETION]):
        completion = logits(steer.model, batch(LONG))
    assert torch.equal(completion[0, :-1], plain[0, :-1])
    assert not torch.equal(completion[0, -1], plain[0, -1])
    only_last = steering(vector_edit(value=30.0, positions={"ranges": [[len(LONG) - 1, len(LONG)]]}))
    with steer.rows([only_last]):
        assert torch.equal(logits(steer.model, batch(LONG)), completion)


def test_the_report_is_what_the_dictionary_says(steer: Steer, sae: Sae) -> None:
    with torch.no_grad():
        states = steer.model(**batch(LONG), output_hidden_states=True).hidden_states[2][0].double()
    activations = torch.stack([encode(sae, x) for x in states])[:, [3, 4]]
    with steer.rows([CLAMP]) as rows:
        logits(steer.model, batch(LONG))
    report = rows.reports()[0]
    assert report is not None
    delta = (9.0 - activations) @ sae.raw()["W_dec"][[3, 4]]
    doses = delta.norm(dim=1) / states.norm(dim=1)
    assert report["sites"] == [SITE]
    assert report["tokens"] == len(LONG)
    assert report["fired"] == 2 * len(LONG)
    assert report["dose"] == {
        "max": pytest.approx(float(doses.max()), rel=1e-4),
        "mean": pytest.approx(float(doses.mean()), rel=1e-4),
        "limited": 0,
    }
    for i, entry in enumerate(report["features"]):
        assert (entry["sae"], entry["feature"], entry["op"]) == ("res", [3, 4][i], "clamp")
        assert entry["mean_before"] == pytest.approx(float(activations[:, i].mean()), abs=1e-4)
        assert entry["mean_after"] == pytest.approx(9.0)


# ------------------------------------------------------------------------------------------- ways to generate


def test_beams(steer: Steer) -> None:
    inputs = batch(LONG, LONG)
    plain = generate(steer.model, inputs, num_beams=2)
    with steer.rows([None, PUSH]) as rows:
        both = generate(steer.model, inputs, num_beams=2)
    assert completions(both, len(LONG))[0] == completions(plain, len(LONG))[0]
    assert completions(both, len(LONG))[1] == alone(steer, LONG, PUSH, num_beams=2)[0]
    assert [report is None for report in rows.reports()] == [True, True, False, False]


def test_several_return_sequences(steer: Steer) -> None:
    inputs = batch(LONG, SHORT)
    kwargs: Json = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    plain = generate(steer.model, inputs, **kwargs)
    torch.manual_seed(0)
    with steer.rows([None, PUSH]) as rows:
        out = generate(steer.model, inputs, **kwargs)
    for before, after in zip(plain.logits, out.logits, strict=True):
        assert torch.equal(before[:3], after[:3])
    assert (plain.logits[0][3:] != out.logits[0][3:]).any(dim=1).all()
    reports = rows.reports()
    assert [report is None for report in reports] == [True] * 3 + [False] * 3
    assert {report["tokens"] for report in reports if report} == {len(SHORT) + NEW - 1}


@pytest.mark.parametrize("request_", [CLAMP, PUSH, PROMPT, COMPLETION], ids=["clamp", "push", "prompt", "completion"])
def test_without_a_cache_the_same_is_edited_and_counted_once(steer: Steer, request_: Json) -> None:
    with_cache = alone(steer, LONG, request_)
    without = alone(steer, LONG, request_, use_cache=False)
    assert without[0] == with_cache[0]
    same_report(without[1], with_cache[1])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_second_generation_in_one_block_starts_anew(steer: Steer, use_cache: bool) -> None:
    expected, report = alone(steer, SHORT, COMPLETION)
    with steer.rows([COMPLETION]) as rows:
        generate(steer.model, batch(LONG), use_cache=use_cache)
        out = generate(steer.model, batch(SHORT), use_cache=use_cache)
    assert completions(out, len(SHORT))[0] == expected
    same_report(rows.reports()[0], report)


@pytest.mark.parametrize("use_cache", [True, False])
def test_going_on_from_a_finished_completion_is_a_new_request(steer: Steer, use_cache: bool) -> None:
    """Its prompt is one token longer than the last pass of the first: told apart, or refused, never guessed."""
    kwargs: Json = {"use_cache": use_cache, "max_new_tokens": 3, "min_new_tokens": 3}
    with steer.rows([COMPLETION]) as rows:
        first = generate(steer.model, batch(SHORT), **kwargs).sequences[0].tolist()
        try:
            generate(steer.model, batch(first), **kwargs)
        except Unsupported:
            return
    _, report = alone(steer, first, COMPLETION, **kwargs)
    assert report["tokens"] == 3
    same_report(rows.reports()[0], report)


def test_a_prompt_in_chunks_needs_the_prompt_lengths(steer: Steer) -> None:
    model, ids = steer.model, torch.tensor([LONG])

    def in_chunks() -> Tensor:
        with torch.no_grad():
            first = model(input_ids=ids[:, :3], use_cache=True)
            mask = torch.ones(1, len(LONG), dtype=torch.long)
            second = model(input_ids=ids[:, 3:], past_key_values=first.past_key_values, attention_mask=mask)
        return torch.cat([first.logits, second.logits], dim=1)

    for request in (COMPLETION, PROMPT, CLAMP):
        with steer.rows([request]) as whole:
            expected = logits(model, batch(LONG))
        with steer.rows([request], prompt_lengths=[len(LONG)]) as rows:
            torch.testing.assert_close(in_chunks(), expected, atol=1e-3, rtol=1e-3)
        same_report(rows.reports()[0], whole.reports()[0])
    with steer.rows([COMPLETION]), pytest.raises(Unsupported, match="prompt_lengths"):
        in_chunks()


def test_a_cache_filled_before_needs_the_prompt_lengths(steer: Steer) -> None:
    with torch.no_grad():
        cache = steer.model(input_ids=torch.tensor([LONG[:3]]), use_cache=True).past_key_values
    with steer.rows([COMPLETION]), pytest.raises(Unsupported, match="prompt_lengths"):
        logits(steer.model, {"input_ids": torch.tensor([LONG[3:]])}, past_key_values=cache)


def test_embeddings_have_positions_but_no_token_ids(steer: Steer) -> None:
    embeddings = steer.model.get_input_embeddings()(torch.tensor([LONG])).detach()
    for request in (CLAMP, COMPLETION):
        with steer.rows([request]):
            expected = logits(steer.model, batch(LONG))
        with steer.rows([request]):
            torch.testing.assert_close(logits(steer.model, {"inputs_embeds": embeddings}), expected)
    for blind in ({"skip_bos": True}, {"when": {"token_in": [17]}}):
        with steer.rows([steering(vector_edit(**blind))]), pytest.raises(Unsupported):
            logits(steer.model, {"inputs_embeds": embeddings})


# ------------------------------------------------------------------------------------------- capacity


def _clamps(count: int) -> list[Json]:
    return [steering(edit(sae="res", features=[feature])) for feature in range(count)]


def test_more_programs_than_slots_are_refused(steer: Steer) -> None:
    with pytest.raises(LimitExceeded, match="max_programs"), steer.rows(_clamps(5)):
        pass
    assert steer.runtime.slots_in_use == 0
    with steer.rows(_clamps(4)):
        assert steer.runtime.slots_in_use == 4


def test_equal_requests_share_a_slot(steer: Steer) -> None:
    with steer.rows([CLAMP] * 9 + [None]):
        assert steer.runtime.slots_in_use == 1


def test_wide_programs_have_slots_of_their_own(steer: Steer) -> None:
    wide = steering(edit(sae="res", features=list(range(20)), value=1.0))
    other = steering(edit(sae="res", features=list(range(20)), value=2.0))
    with steer.rows([wide, *_clamps(4)]) as rows:
        logits(steer.model, batch(*[LONG] * 5))
    assert [len(report["features"]) for report in rows.reports() if report] == [20, 1, 1, 1, 1]
    with pytest.raises(LimitExceeded, match="wide_programs"), steer.rows([wide, other]):
        pass


def test_wide_and_narrow_programs_do_the_same(steer: Steer) -> None:
    """The same edit, once beside eighteen that change nothing."""
    idle = edit(sae="res", features=list(range(10, 28)), op="scale", value=1.0)
    wide = steering(*CLAMP["interventions"], idle)
    with steer.rows([CLAMP, wide]):
        out = logits(steer.model, batch(LONG, LONG))
    torch.testing.assert_close(out[0], out[1], atol=1e-4, rtol=1e-4)


def test_programs_one_after_the_other_do_not_mix(steer: Steer) -> None:
    """More of them than there are slots, at different sites, each as on a fresh model."""
    requests = [*_clamps(7), CLAMP, PUSH, steering(vector_edit(value=5.0))]
    first = [alone(steer, LONG, request)[0] for request in requests]
    assert [alone(steer, LONG, request)[0] for request in reversed(requests)] == first[::-1]
    with sae_steer.attach(steer.model, {"res": steer.catalog.sae("res").sae}) as fresh:
        assert alone(fresh, LONG, requests[6])[0] == first[6]


def test_a_site_that_the_next_program_leaves_alone_is_left_alone(model: PreTrainedModel, vectors: Any) -> None:
    """Also where its neighbour edits there, and its slot held another program's edit of that site before."""
    limits = Limits(max_programs=2, wide_programs=0)
    early, later = "resid_post.0", "resid_post.1"
    here, there, neighbour = (vector_edit(site=site, value=v) for site, v in ((early, 30.0), (later, 30.0), (early, 9)))
    with sae_steer.attach(model, {}, vectors=vectors, sites=[early, later], limits=limits) as steer:
        with steer.rows([steering(there)]):
            expected = logits(model, batch(LONG))[0]
        for request in (here, vector_edit(site=early, value=20.0)):  # now both slots held an edit of the early site
            with steer.rows([steering(request)]):
                assert not torch.allclose(logits(model, batch(LONG))[0], expected, atol=1e-2)
        with steer.rows([steering(there), steering(neighbour)]) as rows:
            out = logits(model, batch(LONG, LONG))
    torch.testing.assert_close(out[0], expected, atol=1e-3, rtol=1e-3)
    assert [report["sites"] for report in rows.reports() if report] == [[later], [early]]


def test_the_map_grows_with_the_batch(steer: Steer) -> None:
    rows = [[1, *[(7 * i + j) % 60 + 3 for j in range(99)]] for i in range(6)]
    with steer.rows([CLAMP] * 6):
        out = logits(steer.model, batch(*rows))
    for i in (0, 5):
        with steer.rows([CLAMP]):
            torch.testing.assert_close(out[i], logits(steer.model, batch(rows[i]))[0], atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------- failures


def test_a_dose_beyond_the_limit_ends_the_request(steer: Steer) -> None:
    limited = PUSH | {"dose": {"limit": 0.5}}
    with pytest.raises(DoseExceeded, match=r"resid_post\.1"), steer.rows([None, limited]):
        generate(steer.model, batch(LONG, SHORT))
    assert steer.runtime.slots_in_use == 0
    with steer.rows([PUSH | {"dose": {"limit": 1e6}}]) as rows:
        generate(steer.model, batch(LONG))
    assert rows.reports()[0]["dose"]["limited"] == 0  # type: ignore[index]


def test_a_dose_may_be_scaled_down_and_is_then_reported(steer: Steer, vectors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        x = steer.model(**batch(LONG), output_hidden_states=True).hidden_states[2][0]
    request = PUSH | {"dose": {"limit": 0.5, "on_dose": "scale"}}
    with steer.rows([request]) as rows, torch.no_grad():
        y = steer.model(**batch(LONG), output_hidden_states=True).hidden_states[2][0]
    unit = vectors["v"] / vectors["v"].norm()
    torch.testing.assert_close(y, x + 0.5 * x.norm(dim=1, keepdim=True) * unit, atol=1e-4, rtol=1e-4)
    dose = rows.reports()[0]["dose"]  # type: ignore[index]
    assert dose["limited"] == len(LONG)
    assert dose["max"] > 0.5  # what was asked for


def test_values_that_are_not_finite_end_the_request(steer: Steer) -> None:
    with (
        pytest.raises(NonFinite, match=r"resid_post\.1"),
        steer.rows([None, steering(vector_edit(vector="huge", value=100.0))]),
    ):
        generate(steer.model, batch(LONG, SHORT))
    assert steer.runtime.slots_in_use == 0


def test_a_request_that_failed_stays_failed(steer: Steer) -> None:
    limited = PUSH | {"dose": {"limit": 0.5}}
    with torch.no_grad():
        cache = steer.model.model(input_ids=torch.tensor([LONG]), use_cache=True).past_key_values
    mask = torch.ones(1, len(LONG) + 1, dtype=torch.long)
    with steer.rows([limited]):
        with pytest.raises(DoseExceeded):
            logits(steer.model, batch(LONG))
        with pytest.raises(DoseExceeded):
            logits(steer.model, {"input_ids": torch.tensor([[5]]), "attention_mask": mask}, past_key_values=cache)


def test_after_a_failure_everything_is_as_before(steer: Steer) -> None:
    plain, (expected, _) = logits(steer.model, batch(LONG)), alone(steer, LONG, CLAMP)
    with pytest.raises(DoseExceeded), steer.rows([PUSH | {"dose": {"limit": 0.5}}]):
        generate(steer.model, batch(LONG))
    with pytest.raises(KeyError), steer.rows([CLAMP]):
        _interrupted(steer)
    assert steer.runtime.slots_in_use == 0
    assert torch.equal(logits(steer.model, batch(LONG)), plain)
    assert alone(steer, LONG, CLAMP)[0] == expected


def _interrupted(steer: Steer) -> None:
    logits(steer.model, batch(LONG))
    raise KeyError


def test_an_exception_inside_the_model_leaves_nothing_armed(steer: Steer) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("inside")

    plain = logits(steer.model, batch(LONG))
    handle = steer.model.model.layers[2].register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="inside"), steer.rows([PUSH]):
        logits(steer.model, batch(LONG))
    handle.remove()
    assert steer.runtime.slots_in_use == 0
    assert torch.equal(logits(steer.model, batch(LONG)), plain)


def test_gradients_are_refused_where_they_would_be_wrong(steer: Steer) -> None:
    with steer.rows([CLAMP]), pytest.raises(Unsupported, match="gradient"):
        steer.model(**batch(LONG))
    with steer.rows([None]):
        assert steer.model(**batch(LONG)).logits.requires_grad
    assert steer.model(**batch(LONG)).logits.requires_grad
    assert steer.runtime.slots_in_use == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_that_do_not_fit_the_requests_are_refused(steer: Steer, count: int) -> None:
    with steer.rows([CLAMP] * 3), pytest.raises(Unsupported, match=f"{count} rows for 3 requests"):
        logits(steer.model, batch(*[LONG] * count))


def test_layouts_whose_positions_cannot_be_told_are_refused(steer: Steer) -> None:
    inputs = batch(LONG)
    holes = inputs | {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}
    with steer.rows([CLAMP]), pytest.raises(Unsupported, match="between tokens"):
        logits(steer.model, holes)
    square = inputs | {"attention_mask": torch.zeros(1, 1, len(LONG), len(LONG))}
    with steer.rows([CLAMP]), pytest.raises(Unsupported, match="two-dimensional"):
        logits(steer.model, square)


# ------------------------------------------------------------------------------------------- requests and starts


def test_requests_come_as_dictionaries_programs_or_nothing(steer: Steer) -> None:
    program = steer.compile(CLAMP)
    assert program is not None
    assert steer.compile(program) is program
    assert steer.compile(None) is None
    assert steer.compile({}) is None
    with steer.rows([program, CLAMP, {}]) as rows:
        assert steer.runtime.slots_in_use == 1
        out = logits(steer.model, batch(LONG, LONG, LONG))
    assert torch.equal(out[0], out[1])
    assert [report is None for report in rows.reports()] == [False, False, True]


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        ({"intervention": []}, SchemaError),
        (steering(edit(sae="gone")), RequestError),
        (steering(edit(sae="res", features=[FEATURES])), RequestError),
    ],
)
def test_a_request_that_cannot_be_honoured_takes_no_slot(steer: Steer, request_: Json, kind: type[Exception]) -> None:
    with pytest.raises(kind), steer.rows([CLAMP, request_]):
        pass
    assert steer.runtime.slots_in_use == 0


def test_the_bos_token_is_the_models(steer: Steer) -> None:
    program = steer.compile(steering(vector_edit(skip_bos=True)))
    assert program is not None
    assert program.selectors[0].skip_token == steer.model.config.bos_token_id


@pytest.mark.parametrize("what", ["sae", "vector"])
def test_widths_must_be_the_models(model: PreTrainedModel, tmp_path: Path, what: str) -> None:
    write_saelens(tmp_path, d_in=HIDDEN + 1, hook_name="blocks.1.hook_resid_post")
    saes = {"odd": tmp_path} if what == "sae" else {}
    vectors = {"odd": torch.ones(HIDDEN + 1)} if what == "vector" else {}
    with pytest.raises(WidthMismatch, match="'odd'"):
        sae_steer.attach(model, saes, vectors=vectors, sites=[SITE])


def test_sites_that_write_before_they_read_are_refused(model: PreTrainedModel, sae: Sae) -> None:
    catalog = Catalog([CatalogSae.make("res", sae, site=Site.parse("resid_post.1->resid_post.0"))])
    with pytest.raises(StartError):
        Steer(model, catalog, Limits(), [])


@pytest.mark.parametrize(
    "limits",
    [{"wide_rows": 16}, {"wide_rows": 8}, {"max_programs": 0, "wide_programs": 0}],
    ids=["as wide", "less wide", "no slots"],
)
def test_limits_that_hold_nothing_are_refused_at_start(model: PreTrainedModel, sae: Sae, limits: Json) -> None:
    with pytest.raises((StartError, ValueError)):
        sae_steer.attach(model, {"res": sae}, limits=Limits(rows=16, **limits)).close()


# ------------------------------------------------------------------------------------------- never unsteered


def test_after_it_is_closed_it_steers_nothing_silently(model: PreTrainedModel, sae: Sae) -> None:
    with sae_steer.attach(model, {"res": sae}) as steer:
        pass
    with pytest.raises((SteerError, RuntimeError)), steer.rows([CLAMP]):
        logits(model, batch(LONG))


def test_one_block_inside_another_is_refused(steer: Steer) -> None:
    """The inner block lays out the pass anew, so the outer one's rows would not be steered."""
    with steer.rows([CLAMP]), pytest.raises((SteerError, RuntimeError)), steer.rows([PUSH]):
        logits(steer.model, batch(LONG))


def test_two_attachments_of_one_model_work_side_by_side(
    steer: Steer, model: PreTrainedModel, vectors: dict[str, Tensor]
) -> None:
    generate_before = vars(model).get("generate")
    add = [steering(vector_edit(site=site)) for site in ("resid_post.0", SITE)]
    with sae_steer.attach(model, {}, vectors=vectors, sites=["resid_post.0", SITE]) as one:
        with one.rows([steering(*(request["interventions"][0] for request in add))]):
            expected = generate(model, batch(LONG)).sequences
        with one.rows([add[0]]) as outer, steer.rows([add[1]]) as inner:
            assert torch.equal(generate(model, batch(LONG)).sequences, expected)
    assert [rows.reports()[0]["sites"] for rows in (outer, inner)] == [["resid_post.0"], [SITE]]  # type: ignore[index]
    assert vars(model).get("generate") is generate_before


def test_what_the_caller_put_on_the_model_stays(steer: Steer) -> None:
    own = steer.model.generate
    vars(steer.model)["generate"] = own
    try:
        with steer.rows([CLAMP]):
            generate(steer.model, batch(LONG))
        assert vars(steer.model).get("generate") is own
    finally:
        vars(steer.model).pop("generate", None)
