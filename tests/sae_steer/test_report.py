"""What is told of a request: every position counts once, failures are named, and numbers are those of the kernel."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.errors import DoseExceeded, NonFinite
from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.report import Run, SiteTally
from sae_steer.sites import Site
from sae_steer.slots import Slot
from sae_steer_kernels import Flag

SITE = Site.parse("resid_post.1")
ROWS = (Row("sha256:a", 4, "clamp", selector=0), Row("sha256:a", 9), Row("sha256:v", -1, "add", selector=1))
PROGRAM = Program((SiteProgram(SITE, ROWS),), (Selector(Phase.ALL), Selector(Phase.COMPLETION)))


def make_run(program: Program = PROGRAM, *, prompt_length: int = 3, slot: int = 1) -> Run:
    return Run(program, Slot(0, slot), prompt_length)


class Kernel:
    """What the op would report for each position of a request, by a rule that is easy to sum up."""

    def __init__(self, length: int, rows: int = 4) -> None:
        positions = np.arange(length)
        self.before = np.full((length, rows), np.nan, dtype=np.float32)  # columns beyond the program's hold anything
        self.before[:, :3] = np.stack([positions, positions * 0 + 7, positions * 0], axis=1)
        self.after = self.before.copy()
        self.after[:, 0] = 2  # so at position 2 nothing changes
        self.after[:, 2] = 1
        self.dose = (positions / 8).astype(np.float32)
        self.flags = np.full(length, Flag.TOUCHED, dtype=np.int32)
        self.flags[self.dose > 0.5] |= Flag.OVER_DOSE

    def add(self, tally: SiteTally, positions: np.ndarray, program: Program = PROGRAM) -> int:
        bits = program.bits(positions, np.zeros_like(positions), 3)
        p = positions
        return tally.add(p, bits, self.before[p], self.after[p], self.dose[p], self.flags[p])


def numbers(tally: SiteTally) -> dict[str, Any]:
    return {
        "tokens": tally.tokens,
        "held": tally.held.tolist(),
        "fired": tally.fired.tolist(),
        "before": tally.before.tolist(),
        "after": tally.after.tolist(),
        "dose": (tally.dose_sum, tally.dose_max),
        "limited": tally.limited,
    }


def test_sums_are_over_the_tokens_on_which_each_edit_holds() -> None:
    tally = SiteTally(PROGRAM.sites[0])
    changed = Kernel(6).add(tally, np.arange(6))
    assert numbers(tally) == {
        "tokens": 6,
        "held": [6, 0, 4],
        "fired": [5, 0, 4],
        "before": [15.0, 0.0, 0.0],
        "after": [12.0, 0.0, 4.0],
        "dose": (pytest.approx(15 / 8), 0.625),
        "limited": 1,
    }
    assert changed == 9


@settings(max_examples=50)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=6))
def test_a_position_that_is_computed_again_counts_once(length: int, steps: list[tuple[int, int]]) -> None:
    """However a request is cut into steps, and however far a preemption takes it back."""
    once = SiteTally(PROGRAM.sites[0])
    kernel = Kernel(length)
    kernel.add(once, np.arange(length))
    tally, done = SiteTally(PROGRAM.sites[0]), 0
    for back, count in [*steps, (0, length)]:
        start = max(done - back, 0)
        end = min(start + count, length)
        if start < end:
            kernel.add(tally, np.arange(start, end))
        done = max(done, end)
    assert done == length
    assert numbers(tally) == numbers(once)  # the doses are sums of eighths: exact in any order


def test_untouched_tokens_count_nowhere() -> None:
    kernel = Kernel(6)
    kernel.flags[:3] = 0
    tally = SiteTally(PROGRAM.sites[0])
    kernel.add(tally, np.arange(6))
    assert (tally.tokens, tally.held.tolist()) == (3, [3, 0, 3])


def test_the_block_of_an_answer() -> None:
    run = make_run()
    tally = run.tally(SITE)
    assert tally is not None
    Kernel(6).add(tally, np.arange(6))
    run.touch(np.arange(6), np.ones(6, dtype=np.bool_))
    report = run.report(lambda _, fingerprint: {"sha256:a": "res", "sha256:v": "honest"}[fingerprint])
    assert report == {
        "sites": ["resid_post.1"],
        "features": [
            {
                "site": "resid_post.1",
                "sae": "res",
                "feature": 4,
                "fingerprint": "sha256:a",
                "op": "clamp",
                "tokens": 6,
                "fired": 5,
                "mean_before": 2.5,
                "mean_after": 2.0,
            },
            {
                "site": "resid_post.1",
                "vector": "honest",
                "fingerprint": "sha256:v",
                "op": "add",
                "tokens": 4,
                "fired": 4,
                "mean_before": 0.0,
                "mean_after": 1.0,
            },
        ],
        "tokens": 6,
        "fired": 9,
        "dose": {"max": 0.625, "mean": pytest.approx(15 / 48), "limited": 1},
    }


def test_a_run_that_touched_nothing_says_so() -> None:
    report = make_run().report(lambda _, fingerprint: fingerprint)
    assert report["tokens"] == report["fired"] == 0
    assert report["dose"] == {"max": 0.0, "mean": 0.0, "limited": 0}
    assert [entry["tokens"] for entry in report["features"]] == [0, 0]


def test_tokens_are_counted_once_over_several_sites() -> None:
    other = Site.parse("resid_post.2")
    program = Program((*PROGRAM.sites, SiteProgram(other, ROWS)), PROGRAM.selectors)
    run = make_run(program)
    for site in (SITE, other):
        tally = run.tally(site)
        assert tally is not None
        Kernel(6).add(tally, np.arange(6))
    run.touch(np.arange(6), np.ones(6, dtype=np.bool_))
    run.touch(np.arange(3, 6), np.ones(3, dtype=np.bool_))  # computed again after a preemption
    report = run.report(lambda _, fingerprint: fingerprint)
    assert (report["tokens"], report["fired"], report["dose"]["limited"]) == (6, 18, 2)
    assert run.tally(Site.parse("resid_pre.0")) is None


def test_a_token_of_length_zero_has_no_dose_to_tell() -> None:
    run = make_run()
    tally = run.tally(SITE)
    assert tally is not None
    kernel = Kernel(6)
    kernel.dose[2] = np.inf
    kernel.add(tally, np.arange(6))
    dose = run.report(lambda _, fingerprint: fingerprint)["dose"]
    assert np.isfinite([dose["max"], dose["mean"]]).all()


# ------------------------------------------------------------------------------------------- failures

FINE = np.array([Flag.TOUCHED, 0], dtype=np.int32)
OVER = np.array([Flag.TOUCHED, Flag.TOUCHED | Flag.OVER_DOSE], dtype=np.int32)
BAD = np.array([Flag.TOUCHED | Flag.NON_FINITE, Flag.TOUCHED], dtype=np.int32)
DOSE = np.array([0.25, 0.75], dtype=np.float32)


@pytest.mark.parametrize(
    ("flags", "on_dose", "failure"),
    [
        (FINE, "fail", None),
        (FINE, "scale", None),
        (OVER, "fail", DoseExceeded),
        (OVER, "scale", None),
        (BAD, "fail", NonFinite),
        (BAD, "scale", NonFinite),
        (BAD | OVER, "fail", NonFinite),
    ],
)
def test_what_ends_a_request(flags: np.ndarray, on_dose: Any, failure: type[Exception] | None) -> None:
    run = make_run(Program(PROGRAM.sites, PROGRAM.selectors, dose_limit=0.5, on_dose=on_dose))
    run.judge(SITE, flags, DOSE)
    assert (type(run.failure) if run.failure is not None else None) is failure
    if run.failure is not None:
        assert str(SITE) in run.failure.message
    if failure is DoseExceeded:
        assert "0.75" in str(run.failure)
        assert "0.5" in str(run.failure)


def test_the_first_failure_stays() -> None:
    run = make_run(Program(PROGRAM.sites, PROGRAM.selectors, dose_limit=0.5))
    run.judge(SITE, OVER, DOSE)
    first = run.failure
    run.judge(SITE, BAD, np.array([math.nan, 0.0], dtype=np.float32))
    assert first is not None
    assert run.failure is first
