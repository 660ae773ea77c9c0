"""What is left of a run: ratios, JSON, plots, and a page that needs nothing else."""

import base64
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib import image
from rich.console import Console

from sae_steer_bench.errors import BenchError
from sae_steer_bench.records import LoadPlan, Plan, Result, RoundEnd
from sae_steer_bench.report import load, write
from sae_steer_bench.result import compare, differences, result_of
from sae_steer_bench.table import tables
from tests.bench.results import NASTY, measurement, plan, result

ROOT = Path(__file__).resolve().parents[2]


def test_ratios_are_of_one_round() -> None:
    found = result(1.25)
    one = found.cases[2].loads["closed"]
    assert one["tpot_ms"].value == pytest.approx(37.5)
    assert one["tpot_ms"].ratios["plain"].median == pytest.approx(1.25)
    assert one["tpot_ms"].ratios["idle"].median == pytest.approx(1.25 / 1.01)
    assert one["output_tokens_per_s"].ratios["plain"].median == pytest.approx(0.8)
    assert one["tpot_ms"].ratios["plain"].high == pytest.approx(1.25)  # the drift of the machine is not in it
    assert found.cases[0].loads["closed"]["tpot_ms"].ratios.keys() == {"idle"}
    assert found.cases[3].loads == {}


def test_a_round_without_a_baseline_has_no_ratio() -> None:
    found = result_of(plan(), [measurement(1, "idle", 10.0), measurement(2, "one", 20.0)])
    assert found.cases[2].loads["closed"]["tpot_ms"].ratios == {}


def test_json_comes_back(tmp_path: Path) -> None:
    found = result()
    page = write(found, tmp_path)
    assert load(tmp_path) == load(tmp_path / "result.json") == found
    assert page == tmp_path / "report.html"


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    loads = [LoadPlan(name="closed", concurrency=4), LoadPlan(name="rate 2/s", concurrency=4, rate=2.0)]
    found = result(loads=loads, stopped=f"the server died {NASTY}")
    page = write(found, tmp_path).read_text()
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>").strip())
    words = " ".join("".join(root.itertext()).split())
    assert "1.250 (1.250 to 1.250)" in words
    assert f"refused: HTTP 400: {NASTY}" in words
    assert f"the server died {NASTY}" in words
    assert not list(root.iter("script"))
    assert not list(root.iter("link"))
    sources = [element.get("src", "") for element in root.iter() if "src" in element.attrib]
    assert sources
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert image.imread(BytesIO(base64.b64decode(data))).size > 0
    assert not re.search(r"(href|src|url|@import)\s*[=(]\s*[\"']?https?:", page)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "closed-itl.png", "closed-output_tokens_per_s-ratio.png", "closed-rounds.png", "closed-tpot-ratio.png",
        "closed-ttft-ratio.png",
    ]  # fmt: skip


def test_the_table_shows_what_was_and_what_was_not_measured() -> None:
    console = Console(width=220, record=True, file=BytesIO() and None, quiet=False)
    with console.capture() as captured:
        console.print(tables(result()), markup=False)
    text = captured.get()
    assert "1.250 (1.250 to 1.250)" in text
    assert "refused: 64 features: HTTP 400" in text


def test_a_killed_run_has_a_report_too(tmp_path: Path) -> None:
    lines = [plan(), *result().measurements]
    text = "".join(line.model_dump_json() + "\n" for line in lines)
    text += "".join(f'{{"kind": "round", "round": {number}}}\n' for number in (1, 2, 3))
    (tmp_path / "run.jsonl").write_text(text)
    found = load(tmp_path)
    assert found.rounds == 3
    assert found.stopped
    assert {each.round for each in found.measurements} == {1, 2, 3}


def journal(folder: Path, rounds: int) -> None:
    """A run of so many complete rounds, by the measurements of :func:`result`."""
    records = [plan(), *result(rounds=rounds).measurements]
    text = "".join(record.model_dump_json() + "\n" for record in records)
    text += "".join(RoundEnd(round=number).model_dump_json() + "\n" for number in range(1, rounds + 1))
    (folder / "run.jsonl").write_text(text)


def test_rounds_that_the_result_does_not_know_count(tmp_path: Path) -> None:
    """A run was stopped and wrote its result, was resumed, and killed before it wrote another."""
    write(result(rounds=5, stopped="the server ended"), tmp_path)
    journal(tmp_path, 5)
    assert load(tmp_path) == result(rounds=5, stopped="the server ended")
    journal(tmp_path, 7)
    found = load(tmp_path)
    assert found.rounds == 7
    assert found.stopped == "the process ended before the run did"
    write(found, tmp_path)
    assert load(tmp_path) == load(tmp_path / "result.json") == found


def test_a_result_is_replaced_whole(tmp_path: Path) -> None:
    write(result(rounds=5), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code = (
        "import resource, sys; from pathlib import Path; from tests.bench.results import result;"
        "from sae_steer_bench.report import write;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); write(result(rounds=9), Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "The report cannot be written: File too large" in done.stderr
    assert {path: path.read_bytes() for path in files} == files
    assert load(tmp_path) == result(rounds=5)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "Invalid JSON"), ('{"version": 2}', "version"), (None, "holds no run")]
)
def test_what_is_no_result(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(BenchError, match=said):
        load(tmp_path)


def test_two_runs_are_held_against_each_other() -> None:
    assert all(row[-1] for row in compare(result(1.25), result(1.25), "tpot_ms"))
    verdicts = {(row[1], row[2]): row[-1] for row in compare(result(1.25), result(1.5), "tpot_ms")}
    assert verdicts["one program", "plain"] is False
    assert verdicts["plugin, nobody steers", "plain"] is True


def test_what_two_runs_do_not_have_in_common_is_told() -> None:
    assert differences(result(), result(1.5)) == []
    other = result(output_tokens=8, loads=[LoadPlan(name="closed", concurrency=8), LoadPlan(name="r", concurrency=8)])
    assert differences(result(), other) == [
        "concurrency was 4 and 8", "output_tokens was 4 and 8", "only one of them has the load 'r'",
    ]  # fmt: skip


def test_every_field_is_documented() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for model in (Result, Plan):
        schema = model.model_json_schema()
        fields = {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", {})}
        missing = [name for name in sorted(fields) if f"`{name}`" not in page]
        assert missing == []
