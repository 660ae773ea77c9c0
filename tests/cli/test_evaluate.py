"""``sae-steer evaluate suppression`` on the embedded model, whose features for the sea and for trains are known."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sae_steer import embedded
from sae_steer.calibration.model import of_folder
from sae_steer.catalog import CatalogSae
from sae_steer.evaluation.result import SuppressionResult, table
from sae_steer.sae import open_sae
from sae_steer_cli.cli import app
from tests.calibrations import made_up, write_calibration

SEA, TRAINS = (551, 592), (26, 465)
BEGINNINGS = (
    "I dreamed about the",
    "Yesterday I saw the",
    "We talked about the",
    "My brother drew the",
    "She likes the",
)
WORDS = {
    "sea": ("sea, and the waves", "tide and the shells", "lighthouse by the sea", "sailor on his boat"),
    "trains": ("trains, and the rails", "station and the train", "locomotive at night", "conductor on the train"),
}


def sentences(part: int) -> list[tuple[str, str]]:
    """Texts and labels; two parts that share none."""
    every = [(f"{start} {words}.", label) for label in WORDS for start in BEGINNINGS for words in WORDS[label]]
    return every[part::2]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled text, plain text, and a calibration in which what fires for the sea fires for nothing else."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "train.csv", sentences(0))
    write(folder / "test.csv", sentences(1))
    plain = [f"{start} garden. It was a quiet day." for start in BEGINNINGS] * 2
    (folder / "plain.txt").write_text("\n".join(plain) + "\n")
    features = sorted((*SEA, *TRAINS))
    own = torch.tensor([feature in TRAINS for feature in features]).long()  # number of the concept
    density = torch.full((len(features), 2, 9), 0.001)
    density[torch.arange(len(features)), own, 1:] = 0.1
    density[:, :, 0] = 1 - density[:, :, 1:].sum(dim=2)
    rank = torch.full((len(features), 2), -1, dtype=torch.int32)
    for concept, mine in enumerate((SEA, TRAINS)):
        for place, feature in enumerate(mine):
            rank[features.index(feature), concept] = place
    record = replace(
        made_up(features, 2),
        width=torch.full((len(features),), 3.0),
        log_density=density.log(),
        fired=torch.ones(len(features), 2, dtype=torch.int64),
        rank=rank,
    )
    entry = CatalogSae.make(embedded.SAE_NAME, open_sae(embedded.SAE))
    model = of_folder(embedded.MODEL)
    write_calibration(folder / "profiles", "topics", entry, record, labels=("sea", "trains"), model=model)
    write_calibration(folder / "profiles", "foreign", entry, record, labels=("sea", "trains"), model="sha256:another")
    return folder


def command(files: Path, out: Path, **changes: str) -> list[str]:
    options = {
        "model": "demo",
        "profile": str(files / "profiles" / "topics"),
        "train": str(files / "train.csv"),
        "data": str(files / "test.csv"),
        "concept": "sea",
        "plain": str(files / "plain.txt"),
        "out": str(out),
        "methods": "full-mask,dampening,app",
        "strengths": "1",
        "levels": "0.5",
        "seeds": "2",
        "samples": "40",
    } | changes
    return ["evaluate", "suppression", "--quiet", *(part for k, v in options.items() for part in (f"--{k}", v))]


def test_a_whole_run_and_one_that_was_killed(files: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command(files, tmp_path / "out"))
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "result.json").read_text()
    result = SuppressionResult.model_validate_json(text)
    assert (result.material.features, result.material.target_texts, result.material.complement_texts) == (2, 10, 10)
    plain, rows = result.unsteered, {(row.method, row.setting): row.measures for row in result.defaults}
    masked, app_ = rows["full-mask", 2.0], rows["app", 1.0]
    assert plain.target_accuracy.value > 0.8
    assert masked.drop.value > 0.05
    assert app_.drop.value > 0.8 * masked.drop.value, "the posterior of what fires for the sea alone is near one"
    assert plain.divergence.value == 0.0
    assert masked.perplexity_rise.interval is not None
    for row in result.matched:
        assert row.measures is not None
        assert row.measures.drop.value == pytest.approx(0.5 * masked.drop.value, abs=1e-6)
    assert result.claim.claim in ("holds", "does not")
    assert {difference.rival for difference in result.claim.differences} == {"full-mask", "dampening"}
    assert table(result) in done.output
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in text

    journal = tmp_path / "out" / "journal.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[:-2]) + whole[-2][:-30])
    again = CliRunner().invoke(app, command(files, tmp_path / "out"))
    assert again.exit_code == 0, again.output
    assert len(journal.read_bytes().splitlines()) == len(whole)
    after = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {**after, "command": ""} == {**json.loads(text), "command": ""}

    (tmp_path / "out" / "plot.png").unlink()
    (tmp_path / "out" / "plot.png").mkdir()
    refused = CliRunner().invoke(app, command(files, tmp_path / "out"))
    assert refused.exit_code == 2, refused.output
    assert f"{tmp_path / 'out' / 'plot.png'} cannot be written: Is a directory" in refused.stderr


MISTAKES = {
    "concept": ({"concept": "merry"}, "Concepts: sea, trains"),
    "profile": ({"profile": "nowhere"}, "has no profile.json"),
    "of another model": ({"profile": "profiles/foreign"}, "made for the model sha256:another"),
    "no full mask": ({"methods": "app"}, "full-mask must be among them"),
    "method": ({"methods": "full-mask,magic"}, "no method 'magic'"),
    "strengths": ({"strengths": "1,strong"}, "not numbers"),
    "levels": ({"levels": "1.5"}, "at most 1"),
    "pool": ({"pool": "max"}, "'max' is not one of"),
    "dtype": ({"dtype": "float8"}, "'float8' is not one of"),
    "label name": ({"label-name": "sea"}, "--label-name 'sea' is not NAME=VALUE"),
    "data": ({"data": "nowhere.csv"}, "nowhere.csv"),
    "label": ({"data": "odd.csv"}, "not in the profile"),
    "one class": ({"data": "one.csv"}, "of other labels"),
    "cut off": ({"data": "cut.csv"}, "ends in the middle"),
    "words": ({"label-words": "sea=sea"}, "no word for 'trains'"),
    "device": ({"device": "gpu"}, "is not a device"),
    "nothing to remove": ({"concept": "trains", "data": "plain.csv", "train": "plain.csv"}, "no removal to match"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_in_words(files: Path, tmp_path: Path, mistake: str) -> None:
    changes, said = MISTAKES[mistake]
    write(files / "odd.csv", [*sentences(1), ("A text.", "odd")])
    write(files / "one.csv", [row for row in sentences(1) if row[1] == "sea"])
    (files / "cut.csv").write_text((files / "test.csv").read_text() + '"A text that')
    blank = [f"{start} garden {n}." for start in BEGINNINGS for n in range(6)]
    write(files / "plain.csv", [(text, ("sea", "trains")[n % 2]) for n, text in enumerate(blank)])
    changes = {k: str(files / v) if k in ("data", "profile", "train") else v for k, v in changes.items()}
    done = CliRunner().invoke(app, command(files, tmp_path / "out", **changes))
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "result.json").exists()
