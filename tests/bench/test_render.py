"""The README's numbers and plots: a result that changes makes them stale."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.results import result

ROOT = Path(__file__).resolve().parents[2]


def copy(folder: Path) -> Path:
    """A copy of what is rendered, and from what."""
    for name in ("benchmarks/render.py", "README.md", "docs/suppression.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("benchmarks/results", "docs/plots"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def render(folder: Path, *words: str) -> str | None:
    """Runs the script in this process; returns why it failed, or None."""
    script = str(folder / "benchmarks" / "render.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            return str(error.code)
    return None


def test_a_changed_result_is_stale_until_it_is_rendered(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    assert render(folder, "--check") is None
    path = folder / "benchmarks" / "results" / "vllm_decode.json"
    # A number that the table rounds away: only the plot knows.
    path.write_text(path.read_text().replace('"rounds":', '"rounds" :'))
    assert "docs/plots is out of date (vllm_decode)" in str(render(folder, "--check"))
    found = json.loads(path.read_text())
    found["cases"][1]["ratio_median"] = 1.2345
    path.write_text(json.dumps(found))
    assert "README.md is out of date" in str(render(folder, "--check"))
    assert render(folder) is None
    assert "1.2345 (" in (folder / "README.md").read_text()
    assert render(folder, "--check") is None


def test_each_concept_of_the_suppression_is_rendered(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    for stem, concept in (("topic", "travel"), ("sentiment", "negative"), ("emotion", "anger")):
        path = folder / "benchmarks" / "results" / f"suppression_{stem}.json"
        found = json.loads(path.read_text())
        assert found["material"]["concept"] == concept
        (half,) = (row for row in found["matched"] if row["level"] == 0.5 and row["method"] == "app")
        half["measures"]["perplexity_rise"] = {"value": 0.4321, "interval": [0.4, 0.5]}
        path.write_text(json.dumps(found))
        assert "README.md is out of date" in str(render(folder, "--check"))
        assert render(folder) is None
        (row,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {concept},"))
        assert "+43.2% (+40.0% to +50.0%)" in row
        section = (folder / "docs" / "suppression.md").read_text().partition(f"begin suppression_{stem} ")[2]
        assert "+43.2% (+40.0% to +50.0%)" in section.partition("<!-- end")[0]


def test_a_run_of_the_command_is_rendered(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    name = "serve_vllm"
    (folder / "benchmarks" / "results" / f"{name}.json").write_text(result().model_dump_json())
    assert render(folder) is None
    assert render(folder, "--check") is None
    section = (folder / "README.md").read_text().partition(f"begin {name}")[2].partition(f"end {name}")[0]
    assert "| one program | 112 ms | 37.5 ms | 107 | 1.250 (1.250 to 1.250) | 1.238" in section
    assert "Not measured: 64 features (refused" in section
    with Image.open(folder / "docs" / "plots" / f"{name}.png") as picture:
        assert picture.size[0] > 500
    (folder / "benchmarks" / "results" / f"{name}.json").unlink()
    assert render(folder, "--check") is not None
