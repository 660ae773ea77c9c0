"""``sae-steer separability``: scores, their chance level, and a report that needs no other file."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from typer.testing import CliRunner, Result

from sae_steer import embedded
from sae_steer.calibration.raw import Sample
from sae_steer_cli.cli import app
from tests.calibration_cases import settings
from tests.sae_files import write_saelens
from tests.topic_texts import sentences, write

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
TOPICS = ("music", "sea")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "topics.jsonl", sentences(400, 3, TOPICS))


def call(data: Path, out: Path, *more: str) -> Result:
    options = ["--model", "demo", "--dtype", "float32", "--data", str(data), "--out", str(out), *more]
    return CliRunner().invoke(app, ["separability", *options], env=PLAIN)


@pytest.fixture(scope="module")
def report(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Of the embedded dictionary, and of one of random directions at an earlier place."""
    folder = tmp_path_factory.mktemp("report")
    width = json.loads((embedded.MODEL / "config.json").read_text())["hidden_size"]
    write_saelens(folder / "noise", d_in=width, n_features=64, hook_name="blocks.1.hook_resid_post")
    result = call(
        data, folder / "out", "--tokens", "all", "--sae", f"own={embedded.SAE}", "--sae", str(folder / "noise")
    )
    assert result.exit_code == 0, result.output
    return folder / "out", result.stdout


def test_scores_are_ordered_by_place_with_coordinates_beside(report: tuple[Path, str]) -> None:
    found = json.loads((report[0] / "separability.json").read_text())
    assert [(s["place"], s["name"]) for s in found["scores"]] == [
        ("resid_post.1", "sae"),
        ("resid_post.1", "raw"),
        ("resid_post.3", "own"),
        ("resid_post.3", "raw"),
    ]
    assert found["labels"] == list(TOPICS)
    for scores in found["scores"]:
        values = np.array(scores["values"])
        assert ((values >= 0) & (values <= 1)).all()
        assert scores["mean"] == pytest.approx(values.mean(), abs=1e-5)
        assert scores["mean"] > scores["chance"] > 0, "topics are there, and chance alone is not nothing"
        assert len(scores["ids"]) + scores["never_fired"] == {"sae": 64, "own": 768, "raw": 192}[scores["name"]]
    own = found["scores"][2]
    concepts = json.loads((embedded.SAE / "concepts.json").read_text())["concepts"]
    known = {int(f) for topic in TOPICS for f in concepts[topic]["candidates"]}
    best = [own["ids"][i] for i in np.argsort(own["values"])[::-1][:6]]
    assert len(known & set(best)) >= 4, "the features of the two topics separate them best"
    assert own["largest"] > 0.25
    assert found["scores"][0]["largest"] < own["largest"], "directions that were not trained do not"


def test_the_report_stands_alone(report: tuple[Path, str]) -> None:
    folder, printed = report
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("http-equiv", "")
    assert len(list(folder.glob("*.png"))) == 5
    for image in folder.glob("*.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
    assert "resid_post.3" in printed
    assert "report.html" in printed


def test_words_of_the_data_are_no_code_of_the_page(tmp_path: Path) -> None:
    rows = [(text, "<script>alert(1)</script>" if c == "sea" else c) for text, c in sentences(80, 4, TOPICS)]
    result = call(write(tmp_path / "d.jsonl", rows), tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--concept", "rain"), "no text has the label 'rain'. Labels: music, sea"),
        (("--sae", f"a={embedded.SAE}", "--sae", f"a={embedded.SAE}"), "Two SAEs have one name"),
        (("--sae", f"raw={embedded.SAE}"), "one is called raw"),
        (("--label-column", "topic"), "no label"),
    ],
)
def test_refusals(data: Path, tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    result = call(data, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_sample_is_uniform_and_bounded() -> None:
    sample = Sample(2, 2, size=500)
    for first in range(0, 10_000, 100):
        x = torch.arange(first, first + 100, dtype=torch.float32)
        sample.add([(0, 1) if i % 2 else (0,) for i in range(100)], torch.stack([x, -x], dim=1))
    assert [sample.of(0).shape, sample.of(1).shape] == [(500, 2), (500, 2)]
    assert len(np.unique(sample.of(0)[:, 0])) == 500
    assert sample.of(0)[:, 0].mean() == pytest.approx(5000, rel=0.05)
    assert np.histogram(sample.of(0)[:, 0], 5)[0].min() > 70
    assert (sample.of(1)[:, 0] % 2 == 1).all()
    assert (sample.of(0)[:, 1] == -sample.of(0)[:, 0]).all()


def test_coordinates_are_scored_without_an_atom() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 3)).astype(np.float32) + 1000  # far from zero, as some coordinates of real models are
    labels = np.arange(4000) % 2
    x[labels == 1, 0] += 2
    x[labels == 1, 1] += 40
    sample = Sample(3, 2)
    sample.add([(int(c),) for c in labels], torch.from_numpy(x))
    found = sample.separability([2000, 2000], settings())
    grid = np.linspace(-8, 10, 4000)
    normal = [np.exp(-0.5 * (grid - shift) ** 2) for shift in (0, 2)]
    assert found[0] == pytest.approx(jensenshannon(*normal, base=2), abs=0.04)
    assert found[1] > 0.95
    assert found[2] < 0.1
    assert sample.separability([2000, 2000], settings(), shuffled=True).max() < 0.1
