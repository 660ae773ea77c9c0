"""The journal: what survives, wherever its writing is cut off."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_steer_bench.errors import BenchError
from sae_steer_bench.journal import NAME, Journal, read
from sae_steer_bench.records import Measurement, RoundEnd
from tests.bench.results import measurement, plan

ROUNDS = 3
CASES = ("plain", "idle", "one")


def write(folder: Path) -> bytes:
    """A whole journal; returns its bytes."""
    with Journal(folder) as journal:
        journal.require_new()
        journal.append(plan())
        for number in range(1, ROUNDS + 1):
            for case in CASES:
                journal.append(measurement(number, case, 10.0 * number))
            journal.append(RoundEnd(round=number))
    return (folder / NAME).read_bytes()


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    found, done, rounds = read(tmp_path)
    assert found == plan()
    assert rounds == [1, 2, 3]
    assert [(each.round, each.case) for each in done] == [(n, c) for n in (1, 2, 3) for c in CASES]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(share=st.floats(0, 1))
def test_cut_anywhere_it_resumes_with_whole_rounds(tmp_path: Path, share: float) -> None:
    (tmp_path / NAME).unlink(missing_ok=True)
    whole = write(tmp_path)
    first = whole.index(b"\n") + 1
    cut = first + round(share * (len(whole) - first))
    (tmp_path / NAME).write_bytes(whole[:cut])
    complete = sum(
        cut >= whole.index(line) + len(line)
        for line in (RoundEnd(round=n).model_dump_json().encode() + b"\n" for n in (1, 2, 3))
    )
    with Journal(tmp_path) as journal:
        _, done = journal.resume()
        assert sorted({each.round for each in done}) == list(range(1, complete + 1))
        assert len(done) == complete * len(CASES)
        for case in CASES:  # the round that was cut off is measured anew
            journal.append(measurement(complete + 1, case, 1.0))
        journal.append(RoundEnd(round=complete + 1))
    _, done, rounds = read(tmp_path)
    assert rounds == list(range(1, complete + 2))
    assert len({(each.round, each.case) for each in done}) == len(done) == (complete + 1) * len(CASES)
    assert all(isinstance(each, Measurement) for each in done)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(BenchError, match="Another process"):
        Journal(tmp_path)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    with Journal(tmp_path) as journal, pytest.raises(BenchError, match="--resume"):
        journal.require_new()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "holds no run"), (b"", "has no plan"), (b'{"kind": "plan"', "has no plan"), (b"[]\n", "not a run")],
)
def test_what_is_no_run(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    with pytest.raises(BenchError, match=said):
        read(tmp_path)
