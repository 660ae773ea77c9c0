"""``sae-steer sweep``: strength by place, resumed where it was killed, and the knee by its definition."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import sae_steer
from sae_steer import embedded
from sae_steer.calibration.sweep import Cell, Journal, knee, knees
from sae_steer.errors import DataError
from sae_steer.sae import open_sae
from sae_steer_cli.cli import app
from tests.topic_texts import sentences, write

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
SEA = 551


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, topics in (("sea", ("sea",)), ("plain", ("music", "snow", "trains"))):
        (folder / f"{name}.txt").write_text("\n".join(text for text, _ in sentences(12, 2, topics)) + "\n")
    return folder / "sea.txt", folder / "plain.txt"


def call(files: tuple[Path, Path], out: Path, *more: str, target: bool = True) -> Result:
    options = ["--model", "demo", "--dtype", "float32", "--plain", str(files[1]), "--out", str(out)]
    return CliRunner().invoke(
        app, ["sweep", *options, *(("--target", str(files[0])) if target else ()), *more], env=PLAIN
    )


def results(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def losses(path: Path, ask: dict | None) -> float:
    """Nats a token, one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    nats = tokens = 0.0
    with sae_steer.attach(model, saes={"embedded": embedded.SAE}) as steer, torch.no_grad():
        for text in path.read_text().splitlines():
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with steer.rows([ask]):
                logits = model(ids).logits[0, :-1].log_softmax(-1)
            nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
    return nats / tokens


def test_a_feature(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = call(files, tmp_path / "o", "--feature", str(SEA), "--strengths", "2,8", "--op", "add")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "o")
    ask = {"interventions": [{"sae": "embedded", "features": [SEA], "op": "add", "value": 8.0}]}
    cell = found["cells"][1]
    assert (cell["place"], cell["strength"]) == ("resid_post.3", 8.0)
    assert cell["effect"] == pytest.approx(losses(files[0], None) - losses(files[0], ask), abs=1e-4)
    assert cell["cost"] == pytest.approx(losses(files[1], ask) - losses(files[1], None), abs=1e-4)
    assert cell["perplexity"] == pytest.approx(math.exp(losses(files[1], ask)), rel=1e-3)
    assert cell["effect"] > found["cells"][0]["effect"] > 0, "more of the sea makes text of it likelier"
    assert cell["dose"] == pytest.approx(4 * found["cells"][0]["dose"], rel=1e-3)
    assert (tmp_path / "o" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_two_files_of_one_name_are_two_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    named = tuple(tmp_path / folder / "test.txt" for folder in ("target", "plain"))
    for path, original in zip(named, files, strict=True):
        path.parent.mkdir()
        shutil.copy(original, path)
    result = call((named[0], named[1]), tmp_path / "o", "--feature", str(SEA), "--strengths", "8")
    assert result.exit_code == 0, result.output
    bare = results(tmp_path / "o")["unsteered"]
    for path, what in zip(named, ("target", "plain"), strict=True):
        assert -bare[what]["log_probability"] / bare[what]["tokens"] == pytest.approx(losses(path, None), abs=1e-4)
    assert losses(named[0], None) != pytest.approx(losses(named[1], None), abs=1e-2)


def test_a_direction_at_several_places(files: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"v": open_sae(embedded.SAE).rows([SEA]).dec[0]}, tmp_path / "sea.safetensors")
    same = ("--strengths", "0.2,0.4,0.8", "--units", "residual_norm", "--phrase", " the sea", "--prompt", "She went to")
    places = ("--site", "resid_post.1", "--site", "resid_post.3")
    by_feature = call(files, tmp_path / "f", "--feature", str(SEA), *places, *same, target=False)
    by_vector = call(files, tmp_path / "v", "--vector", str(tmp_path / "sea.safetensors"), *places, *same, target=False)
    assert by_feature.exit_code == 0, by_feature.output
    assert by_vector.exit_code == 0, by_vector.output
    found = results(tmp_path / "f")
    assert found["cells"] == results(tmp_path / "v")["cells"], "a feature elsewhere is its decoder row"
    assert [(c["place"], c["strength"]) for c in found["cells"]] == [
        (place, s) for place in ("resid_post.1", "resid_post.3") for s in (0.2, 0.4, 0.8)
    ]
    for cell in found["cells"]:
        norm = float(open_sae(embedded.SAE).rows([SEA]).dec[0].norm())
        assert cell["dose"] == pytest.approx(cell["strength"] * norm, rel=1e-3)
        assert cell["effect"] > 0
    assert {k["place"] for k in found["knees"]} <= {"resid_post.1", "resid_post.3"}
    assert by_feature.stdout.count("<- knee") == len(found["knees"])


def test_a_calibrated_concept(files: tuple[Path, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", sentences(300, 3, ("music", "sea")))
    options = ["--data", str(data), "--concept", "sea", "--tokens", "all", "--cap", "8", "--out", str(tmp_path / "sea")]
    made = CliRunner().invoke(app, ["calibrate", "--model", "demo", "--dtype", "float32", *options], env=PLAIN)
    assert made.exit_code == 0, made.output
    result = call(files, tmp_path / "o", "--profile", str(tmp_path / "sea"), "--strengths", "0,1,4")
    assert result.exit_code == 0, result.output
    nothing, once, more = results(tmp_path / "o")["cells"]
    assert nothing["place"] == "resid_post.3 (sea)"
    assert (nothing["effect"], nothing["cost"]) == (0, 0), "a gain to the power of zero is one"
    for cell in (once, more):
        assert cell["effect"] < -0.03, "text of the sea becomes less likely"
        assert cell["cost"] < 0.01, "and text of other things does not"
    assert more["dose"] > once["dose"] > 0
    shutil.copytree(tmp_path / "sea", tmp_path / "other" / "sea")
    both = ("--profile", str(tmp_path / "sea"), "--profile", str(tmp_path / "other" / "sea"), "--strengths", "1")
    refused = call(files, tmp_path / "both", *both)
    assert refused.exit_code == 2
    assert "Two profiles would both be called 'resid_post.3 (sea)'" in refused.stderr


def test_a_killed_sweep_goes_on(files: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--feature", str(SEA), "--op", "scale", "--strengths")
    assert call(files, tmp_path / "o", *options, "0").exit_code == 0
    journal = tmp_path / "o" / "sweep.journal.jsonl"
    first = results(tmp_path / "o")["cells"]
    assert first[0]["effect"] < 0, "scaled to zero, text of the sea is less likely"
    lines = journal.read_bytes().splitlines(keepends=True)
    # The number in the journal is changed: where it comes back, the cell was not run again.
    lines[-1] = lines[-1].replace(json.dumps(first[0]["effect"]).encode(), b"-123.0")
    journal.write_bytes(b"".join(lines) + b'{"cell": {"place": "resid_po')
    assert call(files, tmp_path / "o", *options, "0,3").exit_code == 0
    found = results(tmp_path / "o")["cells"]
    assert [cell["strength"] for cell in found] == [0.0, 3.0]
    assert found[0]["effect"] == -123.0
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    other = call(files, tmp_path / "o", "--feature", "103", "--op", "scale", "--strengths", "0")
    assert other.exit_code == 2
    assert "of a sweep with other settings" in other.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "one of --feature, --vector and --profile"),
        (("--feature", "1", "--profile", "x"), "one of --feature, --vector and --profile"),
        (("--feature", "768"), "has features 0 to 767"),
        (("--feature", "1", "--strengths", "1,x"), "not a list of numbers"),
        (("--feature", "1", "--strengths", "nan"), "not a list of numbers"),
        (("--feature", "1", "--phrase", "a"), "--target FILE, or --phrase"),
        (("--feature", "1", "--site", "resid_post.99"), "layers 0 to"),
        (("--feature", "1", "--site", "resid_post.1", "--op", "clamp"), "only added"),
        (("--profile", "nowhere/none"), "no profile 'none'"),
        (("--profile", str(embedded.PROFILES / "no-trains")), "has no calibration"),
    ],
)
def test_refusals(files: tuple[Path, Path], tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    strengths = () if "--strengths" in more else ("--strengths", "1")
    result = call(files, tmp_path / "o", *more, *strengths)
    assert result.exit_code == 2, result.output
    assert says in result.stderr


def cells(*points: tuple[float, float, float], place: str = "p") -> list[Cell]:
    """From strength, effect and cost."""
    return [Cell(place, s, e, c, math.exp(c), 0.0, 0.0, 0) for s, e, c in points]


def test_the_knee_is_the_point_farthest_above_the_chord() -> None:
    found = knee(cells((1, 0.5, 0.1), (2, 0.8, 0.2), (4, 0.95, 0.6), (8, 1.0, 1.0)))
    assert found is not None
    assert (found.strength, found.above) == (2, pytest.approx(0.6))
    down = knee(cells((1, -0.5, 0.1), (2, -0.8, 0.2), (4, -0.95, 0.6), (8, -1.0, 1.0)))
    assert down == found, "suppression is judged as promotion is"
    assert knee(cells((1, 0.1, 0.5), (2, 1.0, 1.0))) is None, "cost grows faster than effect from the start"
    assert knee(cells((1, 0.0, 0.0), (2, 0.0, 0.0))) is None
    assert knee(cells((1, 0.5, -0.1), (2, 1.0, -0.2))) is None, "nothing is paid"
    assert knee([]) is None
    two = cells((1, 0.9, 0.1), (2, 1.0, 1.0)) + cells((1, 0.1, 0.9), (2, 1.0, 1.0), place="q")
    assert [k.place for k in knees(two)] == ["p"]


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.001, 5), st.floats(0.001, 5)), min_size=1, max_size=8))
def test_scaling_either_axis_moves_no_knee(points: list[tuple[float, float, float]]) -> None:
    one = knee(cells(*points))
    other = knee(cells(*((s, 4 * e, 2 * c) for s, e, c in points)))
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.above == pytest.approx(other.above)


def test_a_foreign_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("hello\n")
    with pytest.raises(DataError, match="not the journal of a sweep"):
        Journal(tmp_path / "j", {})
