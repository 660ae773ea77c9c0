"""What the CPU benchmarks share: every case once a round, in a new order, and a result that says how it was made."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "recording.py"))


def counted(calls: list[str]) -> dict[str, Callable[[], float]]:
    """Calls that write down their names."""

    def call(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    return {name: lambda name=name: call(name) for name in "abcd"}


def test_a_round_has_every_case_once_in_a_new_order() -> None:
    calls: list[str] = []
    found = SHARED["in_turns"](counted(calls), rounds=12, minutes=1)
    orders = [tuple(calls[start : start + 4]) for start in range(0, len(calls), 4)]
    assert len(orders) == 12
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 6
    # What was measured in a round stands at its place, whatever the order was.
    assert [sorted(values) for values in zip(*found.values(), strict=True)] == [
        [4.0 * n + 1, 4.0 * n + 2, 4.0 * n + 3, 4.0 * n + 4] for n in range(12)
    ]


@pytest.mark.parametrize(("minutes", "enough", "rounds"), [(0, False, 5), (1, True, 31), (1, False, 50)])
def test_when_rounds_end(minutes: float, enough: bool, rounds: int) -> None:
    found = SHARED["in_turns"](counted([]), rounds=50, minutes=minutes, enough=lambda _: enough)
    assert {len(values) for values in found.values()} == {rounds}


def test_a_result_says_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/x.py", "--out", "a b"])
    SHARED["write"](tmp_path / "new" / "x.json", "x", threads=2, versions={"vllm": "1"}, rounds=5)
    result = json.loads((tmp_path / "new" / "x.json").read_text())
    assert result["command"] == "python benchmarks/x.py --out 'a b'"
    assert result["versions"].keys() >= {"python", "torch", "sae_steer", "vllm"}
    assert result["hardware"]["cpu"]
    assert (result["hardware"]["threads"], result["rounds"]) == (2, 5)
