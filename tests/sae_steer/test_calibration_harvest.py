"""From texts to statistics: which tokens, the same activations as everywhere, and nothing lost when a run is killed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sae_steer import embedded
from sae_steer.calibration.data import Columns, Reader, Text
from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.gather import gather
from sae_steer.calibration.harvest import Harvester, Progress, Window, check_width, context_of, windows
from sae_steer.calibration.observe import Observing, Tokeniser, batches, beginning
from sae_steer.calibration.shards import Shards
from sae_steer.calibration.statistics import Statistics
from sae_steer.errors import DataError, NonFinite, WidthMismatch
from sae_steer.sae import open_sae
from sae_steer.sites import Place
from sae_steer.whole_files import write_whole
from tests import sae_forward
from tests.sae_files import write_saelens
from tests.topic_texts import sentences, write

LABELS = ("rain", "sea")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.MODEL)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.whole(open_sae(embedded.SAE))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "d.jsonl", sentences(700, 3, LABELS))


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_the_encoder_is_the_definition(tmp_path: Path, architecture: str, normalisation: str) -> None:
    write_saelens(tmp_path / "s", architecture=architecture, normalize_activations=normalisation, n_features=96)
    sae = open_sae(tmp_path / "s")
    x = sae_forward.tokens(sae.spec.d_in, 300)
    wanted = sae_forward.encode(sae.spec, sae.rows(range(96)), x).numpy()
    active = Encoder.whole(sae)(x.float())
    found = np.zeros_like(wanted)
    found[active.rows, active.features] = active.values
    assert (active.values > 0).all()
    # Where a pre-activation is nearly on its threshold, the two may round it to different sides.
    differs = ~np.isclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert differs.sum() <= 2
    assert np.count_nonzero(wanted) > 100


def test_an_encoder_in_blocks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_saelens(tmp_path / "s", architecture="topk")
    encoder = Encoder.whole(open_sae(tmp_path / "s"))
    x = sae_forward.tokens(16, 100).float()
    whole = encoder(x)
    monkeypatch.setattr("sae_steer.calibration.encode._BLOCK_BYTES", 4 * 32 * 7)
    parts = encoder(x)
    assert whole.rows.tolist() == parts.rows.tolist()
    assert whole.features.tolist() == parts.features.tolist()
    np.testing.assert_allclose(whole.values, parts.values, rtol=1e-6)
    assert encoder(x[:0]).rows.size == 0


def observed(tokenizer: PreTrainedTokenizerBase, how: Observing, *rows: Text) -> list:
    return Tokeniser(tokenizer, how, LABELS)(list(rows))


def test_which_tokens_are_observed(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Anna saw the lighthouse near the boats."
    row = Text(1, text, ("sea",), (text.index("lighthouse"), text.index("lighthouse") + len("lighthouse")))
    ids = tokenizer(text)["input_ids"]
    [last] = observed(tokenizer, Observing("last"), row)
    assert (last.ids, last.positions, last.labels, last.cut) == (ids, [len(ids) - 1], (1,), False)
    [every] = observed(tokenizer, Observing("all"), row)
    assert every.positions == list(range(len(ids)))
    [span] = observed(tokenizer, Observing("labelled-span", span="all"), row)
    assert tokenizer.decode([ids[p] for p in span.positions]).strip() == "lighthouse"
    [end] = observed(tokenizer, Observing("labelled-span"), row)
    assert end.positions == span.positions[-1:]
    [cut] = observed(tokenizer, Observing("last", max_length=3), row)
    assert (cut.ids, cut.positions, cut.cut) == (ids[:3], [2], True)
    [lost] = observed(tokenizer, Observing("labelled-span", max_length=2), row)
    assert lost.positions == []
    bos = tokenizer.bos_token_id
    if bos is not None:
        [skipped] = observed(tokenizer, Observing("all", skip_bos=True), row)
        assert [ids[p] for p in skipped.positions] == [i for i in ids if i != bos]
    with pytest.raises(DataError, match=r"line 1: no span.*--span-columns"):
        observed(tokenizer, Observing("labelled-span"), row._replace(span=None))


def test_spans_on_a_real_file(assets: Path) -> None:
    path = assets / "data" / "homographs_wikipedia.csv"
    columns = Columns("sentence", "sense_id", start="start", end="end", only=(("word", "bass"),))
    rows = [row for row in Reader(path, columns) if isinstance(row, Text)]
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "mixed-3m")
    labels = sorted({label for row in rows for label in row.labels})
    found = Tokeniser(tokenizer, Observing("labelled-span", span="all"), labels)(rows)
    assert len(found) > 50
    assert {tokenizer.decode([text.ids[p] for p in text.positions]).strip().lower() for text in found} == {"bass"}


def test_batches_hold_every_text_once(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    [first, *_] = windows(Reader(data, Columns()))
    texts = Tokeniser(tokenizer, Observing("all"), LABELS)(first.texts)
    made = list(batches(texts, 200, 0))
    assert sorted(text.row.line for batch in made for text in batch.texts) == [t.line for t in first.texts]
    assert all(batch.ids.numel() <= 200 or len(batch.texts) == 1 for batch in made)
    assert sum(batch.tokens for batch in made) == sum(len(text.ids) for text in texts)


@torch.no_grad()
def test_statistics_are_those_of_one_text_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoder: Encoder, data: Path
) -> None:
    rows = [row for row in Reader(data, Columns()) if isinstance(row, Text)][:60]
    harvester = Harvester(
        model, Tokeniser(tokenizer, Observing("all"), LABELS), encoder, Place.parse("resid_post.3"), 512
    )
    found, progress = Statistics(encoder.features, 2), Progress()
    harvester.run(Window(rows, 0, 0), found, progress)
    found.settle()
    total, fired, seen = np.zeros((encoder.features, 2)), np.zeros((encoder.features, 2)), np.zeros(2)
    sae = open_sae(embedded.SAE)
    dictionary = sae.rows(range(encoder.features))
    for row in rows:
        ids = tokenizer(row.text, return_tensors="pt")
        x = model(**ids, output_hidden_states=True).hidden_states[4][0].double()
        f = sae_forward.encode(sae.spec, dictionary, x).numpy()
        label = LABELS.index(row.labels[0])
        total[:, label] += f.sum(axis=0)
        fired[:, label] += (f > 1e-4).sum(axis=0)
        seen[label] += len(f)
    assert found.observations.tolist() == seen.tolist()
    assert progress.tokens == seen.sum()
    np.testing.assert_allclose(found.total, total, rtol=1e-3, atol=1e-2)
    assert np.abs(found.fired - fired).sum() < 0.001 * fired.sum() + 5


def counted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    data: Path,
    folder: Path,
    stop: int = -1,
) -> Statistics:
    """Gathers a file; an engine that dies after ``stop`` windows stands for a kill."""
    harvester = Harvester(model, Tokeniser(tokenizer, Observing("last"), LABELS), encoder, Place.parse("resid_post.3"))
    left = [stop]

    class Mortal:
        def run(self, window: Window, into: Statistics, progress: Progress) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            harvester.run(window, into, progress)

    with Shards(folder, {"what": "this"}) as shards:
        found = gather(Mortal(), data, Columns(), shards, features=encoder.features, labels=2, every=0.0)
    return found.statistics


def test_a_killed_run_goes_on_and_loses_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    whole = counted(model, tokenizer, encoder, data, tmp_path / "whole")
    for windows_done in (1, 1):  # twice: the second time it goes on from the first one's shard
        with pytest.raises(KeyboardInterrupt):
            counted(model, tokenizer, encoder, data, tmp_path / "killed", windows_done)
    (tmp_path / "killed" / "half.tmp").write_bytes(b"what a kill leaves of a shard")
    found = counted(model, tokenizer, encoder, data, tmp_path / "killed", 1)
    assert found.observations.sum() == 700
    for name in ("observations", "fired"):
        assert (getattr(found, name) == getattr(whole, name)).all()
    assert found.sketch.keys.tolist() == whole.sketch.keys.tolist()
    assert found.sketch.counts.tolist() == whole.sketch.counts.tolist()
    np.testing.assert_allclose(found.total, whole.total, rtol=1e-12)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    for _ in range(2):
        with Shards(tmp_path / "run", {"model": "a", "data": "b"}):
            pass
    with pytest.raises(DataError, match=r"other settings \(model\).*--restart"):
        Shards(tmp_path / "run", {"model": "c", "data": "b"})
    with pytest.raises(DataError, match="not empty"):
        Shards(tmp_path, {"model": "a"})
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Shards(tmp_path / "run", {"model": "a", "data": "b"})
    with Shards(tmp_path / "run", {"model": "c"}, restart=True) as shards:
        assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == {"model": "c"}
        shards.remove()
    assert not (tmp_path / "run").exists()


def test_two_processes_never_work_in_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from sae_steer.calibration.shards import Shards\n"
        "with Shards(Path(sys.argv[1]), {}): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for restart in (False, True):
            with pytest.raises(DataError, match="Another process works in"):
                Shards(tmp_path / "run", {}, restart=restart)
        other.kill()
    with Shards(tmp_path / "run", {}):  # a kill leaves no lock
        pass


def test_a_shard_that_is_not_the_next_one_is_refused(data: Path, tmp_path: Path) -> None:
    class Nothing:
        def run(self, window: Window, into: Statistics, progress: Progress) -> None:
            progress.texts += len(window.texts)

    def run() -> int:
        with Shards(tmp_path / "run", {}) as shards:
            return gather(Nothing(), data, Columns(), shards, features=2, labels=2, every=0.0).progress.texts

    assert run() == run() == 700
    first, _, third = sorted((tmp_path / "run").glob("shard-*"))
    fourth = tmp_path / "run" / "shard-000003.safetensors"
    fourth.write_bytes(third.read_bytes())  # what a second process would add
    with pytest.raises(DataError, match=r"does not begin at byte \d+.*--restart"):
        run()
    fourth.unlink()
    first.unlink()
    with pytest.raises(DataError, match="does not begin at byte 0,"):
        run()


def test_a_shard_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with Shards(tmp_path / "run", {}) as shards:
        (tmp_path / "run" / "shard-000001.safetensors").mkdir()
        with pytest.raises(DataError, match=r"shard-000001\.safetensors cannot be written: Is a directory"):
            shards.append({}, {})


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    with Shards(tmp_path / "run", {}) as shards:
        shards.append(Statistics(2, 2).tensors(), {"offset": "1"})
        write_whole(tmp_path / "run" / "shard-000001.safetensors", b"half of it")
        with pytest.raises(DataError, match=r"shard-000001.* is damaged.*--restart"):
            list(shards.read())
        shards.remove()
    assert not (tmp_path / "run").exists()


def test_values_that_are_not_finite_name_the_line(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()
    row = Text(41, "A boat.", ("sea",), None)
    harvester = Harvester(model, Tokeniser(tokenizer, Observing(), LABELS), encoder, Place.parse("resid_post.3"))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(row.text)["input_ids"][-1]] = float("nan")
    with pytest.raises(NonFinite, match=r"resid_post\.3, for the text of line 41"):
        harvester.run(Window([row], 0, 0), Statistics(encoder.features, 2), Progress())


def test_what_does_not_fit_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    write_saelens(tmp_path / "s", d_in=16)
    narrow = Encoder.whole(open_sae(tmp_path / "s"))
    with pytest.raises(WidthMismatch, match="'res' reads vectors of width 16"):
        check_width(model, Place.parse("resid_post.3"), narrow, "res")
    most = model.config.max_position_embeddings
    assert context_of(model, None) == most
    with pytest.raises(DataError, match=f"more than the model's context of {most}"):
        context_of(model, most + 1)
    with pytest.raises(DataError, match="more than 33554432 pairs"):
        Statistics(2**20, 2**10)


def test_lines_of_a_window_go_on_where_the_last_ended(data: Path) -> None:
    found = list(windows(Reader(data, Columns()), 300))
    assert [len(window.texts) for window in found] == [300, 300, 100]
    again = list(windows(Reader(data, Columns(), found[0].offset, found[0].line), 300))
    assert [window.texts for window in again] == [window.texts for window in found[1:]]
    assert json.loads(data.read_text().splitlines()[300])["text"] == again[0].texts[0].text


def test_a_window_ends_by_characters_too(tmp_path: Path) -> None:
    rows = [("word " * 2**16, "sea")] * 9 + [("short", "sea")] * 5
    data = write(tmp_path / "long.jsonl", rows)
    found = list(windows(Reader(data, Columns())))
    assert [len(window.texts) for window in found] == [4, 4, 6]
    again = list(windows(Reader(data, Columns(), found[0].offset, found[0].line)))
    assert again == found[1:], "a run that goes on has the same windows"


class Counting:
    """A tokenizer that remembers the most characters that it was given at once."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self.inner, self.most = inner, 0
        self.is_fast, self.bos_token_id = inner.is_fast, inner.bos_token_id

    def __call__(self, text: str | list[str], **options: object) -> object:
        self.most = max(self.most, *map(len, [text] if isinstance(text, str) else text))
        return self.inner(text, **options)


@pytest.mark.parametrize("unit", ["the sea and its boats ", "lighthouse", " ", "é漢字🙂 "])
@pytest.mark.parametrize("most", [1, 7, 200])
def test_a_long_text_is_cut_before_it_is_tokenised_and_its_tokens_are_the_same(
    tokenizer: PreTrainedTokenizerBase, unit: str, most: int
) -> None:
    text = "A boat " + unit * (200_000 // len(unit))
    start = beginning(tokenizer, text, most)
    assert text.startswith(start)
    assert tokenizer(start)["input_ids"][:most] == tokenizer(text)["input_ids"][:most]
    counting = Counting(tokenizer)
    [found] = Tokeniser(counting, Observing("all", max_length=most), LABELS)([Text(1, text, ("sea",), None)])  # type: ignore[arg-type]
    assert (found.ids, found.cut) == (tokenizer(text)["input_ids"][:most], True)
    assert counting.most <= len(start) < len(text) // 8


def test_a_text_of_few_tokens_is_taken_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    """What looks long may be short in tokens: then more is taken, until it is all."""

    class Wide(Counting):
        def __call__(self, text: str | list[str], **options: object) -> object:
            super().__call__(text)
            assert isinstance(text, str)
            return {"input_ids": [1] * (len(text) // 100)}

    wide = Wide(tokenizer)
    assert len(beginning(wide, "x" * 100_000, 10)) >= 100 * 10  # type: ignore[arg-type]
    assert len(beginning(wide, "x" * 5_000, 10)) == 5_000  # type: ignore[arg-type]
