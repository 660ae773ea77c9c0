"""What the commands that run a model themselves cannot do is one line, whatever it is."""

import os
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from sae_steer import embedded
from sae_steer.errors import DataError, DoseExceeded, NonFinite, RunFailed, SchemaError, SteerError
from sae_steer_cli.cli import app
from sae_steer_cli.refusal import refusals
from tests.topic_texts import sentences, write

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
SWEPT = ("--feature", "551", "--strengths", "1")
COMMANDS = ("calibrate", "find", "separability", "sweep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a model all of whose values are not finite."""
    made = tmp_path_factory.mktemp("files")
    rows = sentences(60, 3, ("music", "sea"))
    write(made / "d.jsonl", rows)
    for topic in ("music", "sea"):
        (made / f"{topic}.txt").write_text("".join(f"{text}\n" for text, label in rows if label == topic))
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(made / "broken")
    AutoTokenizer.from_pretrained(embedded.MODEL).save_pretrained(made / "broken")
    return made


def call(command: str, folder: Path, out: Path, *more: str, model: str = "demo") -> Result:
    options = {
        "calibrate": ["--data", "d.jsonl", "--concept", "sea", "--out", str(out)],
        "find": ["--positive", "sea.txt", "--negative", "music.txt"],
        "separability": ["--data", "d.jsonl", "--out", str(out)],
        "sweep": ["--plain", "music.txt", "--target", "sea.txt", "--out", str(out), *SWEPT],
    }[command]
    files = [str(folder / part) if part.endswith((".jsonl", ".txt")) else part for part in options]
    sae = ["--sae", f"embedded={embedded.SAE}"]
    return CliRunner().invoke(app, [command, "--model", model, *sae, *files, "--quiet", *more], env=PLAIN)


def one_line(result: Result) -> str:
    """What it says; the exception that would be a traceback is raised again."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if "fewer than 50 texts" not in line]
    assert len(said) == 1, result.stderr
    return said[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("device", "says"), [("gpu", "is not a device"), ("meta", "cannot run there")])
def test_what_is_no_device(folder: Path, tmp_path: Path, command: str, device: str, says: str) -> None:
    assert says in one_line(call(command, folder, tmp_path / "o", "--device", device))


@pytest.mark.parametrize("command", ["calibrate", "find", "separability"])
def test_a_model_whose_values_are_not_finite(folder: Path, tmp_path: Path, command: str) -> None:
    said = one_line(call(command, folder, tmp_path / "o", model=str(folder / "broken")))
    assert "The model computes values that are not finite at resid_post.3, for the text of line" in said


@pytest.mark.parametrize("command", ["calibrate", "separability", "sweep"])
def test_a_file_in_the_way_of_the_folder(folder: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "o").write_text("mine")
    said = one_line(call(command, folder, tmp_path / "o"))
    assert str(tmp_path / "o") in said
    assert "cannot be written: File exists" in said or "is in the way" in said
    assert (tmp_path / "o").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "name"), [("separability", "report.html"), ("sweep", "sweep.json"), ("sweep", "sweep.journal.jsonl")]
)
def test_a_result_that_cannot_be_written(folder: Path, tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "o" / name).mkdir(parents=True)
    said = one_line(call(command, folder, tmp_path / "o"))
    assert f"{tmp_path / 'o' / name} cannot be written: Is a directory" in said


@pytest.mark.parametrize("error", [RunFailed, DoseExceeded, NonFinite, SchemaError, DataError])
def test_every_error_of_ours_is_said(error: type[SteerError], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, refusals():
        raise error("Why, and what to do.")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == "sae-steer: Why, and what to do.\n"
