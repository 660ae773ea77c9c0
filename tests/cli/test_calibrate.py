"""``sae-steer calibrate``: one command from labelled text to a profile, on models whose concepts are known."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from sae_steer import embedded
from sae_steer.calibration.model import of_source
from sae_steer.calibration.record import CALIBRATION_FILE, Calibration
from sae_steer.calibration.shards import Shards
from sae_steer.catalog import ProfileStore
from sae_steer.errors import CheckpointError
from sae_steer.sae import open_sae
from sae_steer.schema import Profile
from sae_steer_cli.cli import app
from tests import real_sae
from tests.topic_texts import sentences, write

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
TOPICS = ("food", "music", "sea")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "topics.jsonl", sentences(900, 3, TOPICS))


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["calibrate", "--model", "demo", "--dtype", "float32", "--data", str(data), "--out", str(out), *more]


def call(*command: str) -> Result:
    return CliRunner().invoke(app, command, env=PLAIN)


def read(folder: Path) -> tuple[Profile, Calibration]:
    profile = ProfileStore(folder.parent).get(folder.name)
    assert profile.calibration is not None
    return profile, Calibration.read(folder, profile.calibration)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("profiles") / "no-sea"
    result = call(*arguments(data, out, "--concept", "sea", "--concept", "music", "--tokens", "all", "--cap", "8"))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_the_known_features_of_a_topic_are_found(made: tuple[Path, str]) -> None:
    out, printed = made
    profile, calibration = read(out)
    concepts = json.loads((embedded.SAE / "concepts.json").read_text())["concepts"]
    for concept in ("sea", "music"):
        best = calibration.features[calibration.chosen(TOPICS.index(concept))].tolist()
        known = {int(feature) for feature in concepts[concept]["candidates"]}
        assert len(best) == 8
        assert best[0] in known
        assert len(known & set(best)) >= 3
        assert concepts[concept]["feature"] in best
        assert f"{concept}: 8 features" in printed
    info = profile.calibration
    assert info is not None
    assert info.labels == list(TOPICS)
    assert sum(info.documents) == 900
    assert info.model == of_source(str(embedded.MODEL))
    assert info.sae_fingerprint == open_sae(embedded.SAE).fingerprint
    assert info.site == "resid_post.3"
    assert [(edit.op, edit.concept) for edit in profile.interventions] == [("app", "sea"), ("app", "music")]
    assert not (out.parent / f".{out.name}.partial").exists()


def test_the_summary_says_how_to_use_it(made: tuple[Path, str]) -> None:
    out, printed = made
    for words in (
        f"sae-steer serve demo --profiles {out.parent}",
        '"steering": {"profiles": ["no-sea"]}',
        'model="demo:no-sea"',
        '"calibration": "no-sea"',
        "never fired",
        "known to 0.4%",
    ):
        assert words in printed


def test_the_gain_attenuates_the_concept_most_where_it_is(made: tuple[Path, str]) -> None:
    _, calibration = read(made[0])
    sea = TOPICS.index("sea")
    rows = calibration.chosen(sea)[:1]
    density = calibration.log_density[rows, :, 1:].double().exp()
    gain = 1 - density[:, sea] / density.sum(dim=1)
    left = [float((gain * density[:, c]).sum() / density[:, c].sum()) for c in range(len(TOPICS))]
    assert left[sea] < 0.2, "where the topic is, little of its best feature is left"
    assert min(left) == left[sea]


def test_an_interrupted_replacement_is_never_loaded(made: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "p"
    out.mkdir()
    for file in made[0].iterdir():
        (out / file.name).write_bytes(file.read_bytes().replace(b'"no-sea"', b'"p"'))
    profile, calibration = read(out)
    assert profile.calibration is not None
    calibration.mean.add_(1.0)
    calibration.write(out)  # what a replacement does first; then it dies
    with pytest.raises(CheckpointError, match="not the file that"):
        Calibration.read(out, profile.calibration)


def test_a_killed_command_goes_on(data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert call(*arguments(data, whole, "--concept", "sea", "--batch-tokens", "512")).exit_code == 0
    out = tmp_path / "killed"
    mine = arguments(data, out, "--concept", "sea", "--batch-tokens", "512", "--shard-seconds", "0")
    program = "import sae_steer_cli.cli as c, torch; torch.set_num_threads(1); c.main()"
    process = subprocess.Popen([sys.executable, "-c", program, *mine], stdout=subprocess.DEVNULL, env=PLAIN)
    shard = tmp_path / ".killed.partial" / "shard-000000.safetensors"
    end = time.monotonic() + 120
    while not shard.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "it ended before it could be killed"
    assert not (out / "profile.json").exists()
    refused = call(*arguments(data, out, "--concept", "sea", "--batch-tokens", "1024"))
    assert refused.exit_code == 2
    assert "begun with other settings (batch_tokens)" in refused.stderr
    result = call(*mine)
    assert result.exit_code == 0, result.output
    done = int(result.stdout.split(" texts now")[0].split()[-1])
    assert done in (900 - 256, 900 - 512, 900 - 768), "texts of whole shards are not run again"
    for name in ("features", "fired", "rank"):
        assert torch.equal(getattr(read(out)[1], name), getattr(read(whole)[1], name))
    torch.testing.assert_close(read(out)[1].log_density, read(whole)[1].log_density, rtol=0, atol=1e-5)


def test_a_folder_in_which_another_process_works_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [("a", "x"), ("b", "y")])
    with Shards(tmp_path / ".p.partial", {}):
        for restart in ((), ("--restart",)):
            result = call(*arguments(path, tmp_path / "p", "--concept", "x", *restart))
            assert result.exit_code == 2
            assert "Another process works in" in result.stderr
        assert json.loads((tmp_path / ".p.partial" / "manifest.json").read_text()) == {}


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([("a", "x")] * 60, (), "all texts have one label, x (60)"),
        ([("a", "x"), ("b", "y")], ("--concept", "z"), "no text has the label 'z'. Labels: x (1), y (1)"),
        ([("a", "x"), ("b", "")], (), "line 2: no label. Pass --skip-unlabelled"),
        ([("a", "x"), ("b", "y")], ("--tokens", "labelled-span"), "--span-columns START,END"),
        ([("a", "x"), ("b", "y")], ("--label-name", "x"), "--label-name 'x' is not NAME=VALUE"),
        ([("a", "x"), ("b", "y")], ("--max-length", "100000"), "more than the model's context"),
        ([("a", "x"), ("b", "y")], ("--sae", "/nowhere"), "There is no folder or file"),
        ([("a", "x"), ("b", "y")], ("--engine", "vllm", "--device", "cpu"), "are transformers'"),
        ([("a", "x"), ("b", "y")], ("--engine", "vllm", "--batch-tokens", "64"), "are transformers'"),
    ],
)
def test_refusals(tmp_path: Path, rows: list[tuple[str, str]], more: tuple[str, ...], says: str) -> None:
    path = write(tmp_path / "d.jsonl", rows)
    named = () if "--concept" in more else ("--concept", "x")
    result = call(*arguments(path, tmp_path / "p", *named, *more))
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "p").exists()


def test_a_profile_is_replaced_only_by_force(made: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    result = call(*arguments(data, made[0], "--concept", "sea"))
    assert result.exit_code == 2
    assert "replace it with --force" in result.stderr
    result = call(*arguments(data, tmp_path / "a name", "--concept", "sea"))
    assert result.exit_code == 2
    assert "'a name' is not a name for a profile" in result.stderr


def test_few_texts_are_warned_of(tmp_path: Path) -> None:
    rows = sentences(120, 5, ("sea",)) + sentences(3, 6, ("music",))
    out = tmp_path / "few"
    result = call(*arguments(write(tmp_path / "d.jsonl", rows), out, "--concept", "music", "--tokens", "all"))
    assert result.exit_code == 0, result.output
    assert "fewer than 50 texts of music (3): their densities are widened" in result.stderr
    profile, _ = read(out)
    assert profile.calibration is not None
    assert profile.calibration.documents == [3, 120]


def test_real_comments(assets: Path, tmp_path: Path) -> None:
    """A real model, real labelled text, and a dictionary trained on it: toxicity."""
    folder = assets / "models" / "mixed-3m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = assets / "data" / "toxicity_surge.csv"
    with file.open(encoding="utf-8", newline="") as opened:
        texts = [row["text"] for row in csv.DictReader(opened)][:200]
    x = real_sae.residuals(model, tokenizer, texts, 3)
    tensors = real_sae.train(x, 256, steps=100)
    maxima = real_sae.activations(tensors, x).amax(dim=0)
    real_sae.save(tensors, tmp_path / "sae", architecture="jumprelu", layer=3, maxima=maxima)
    out = tmp_path / "toxic"
    result = call(
        "calibrate", "--model", str(folder), "--sae", f"res={tmp_path / 'sae'}", "--data", str(file), "--out", str(out),
        "--concept", "toxic", "--label-column", "toxic", "--label-name", "0=other", "--label-name", "1=toxic",
        "--tokens", "all",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    profile, calibration = read(out)
    assert profile.calibration is not None
    assert dict(zip(profile.calibration.labels, profile.calibration.documents, strict=True)) == {
        "other": 499,
        "toxic": 501,
    }
    best = calibration.chosen(1)[:5]
    assert (calibration.auroc[best, 1] > 0.51).all()
    rate = calibration.fired[best].double() / torch.tensor(profile.calibration.observations)
    assert (rate[:, 1] > 1.3 * rate[:, 0]).all(), "each of the best fires more on toxic comments"


def test_help_teaches() -> None:
    found = call("calibrate", "--help").stdout
    for words in ("--tokens labelled-span", "--label-separator", "--concept toxic", "goes on where it was", "50 texts"):
        assert words in found
    assert CALIBRATION_FILE == "profile.safetensors"
