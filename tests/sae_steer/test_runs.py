"""Runs as rows of tensors: where each is edited, what becomes of its sums, and nobody else's among them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_steer.errors import DoseExceeded, NonFinite
from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.runs import FAILED, TOUCHED, RunTable, Sums, columns
from sae_steer_kernels import LAY_OUT, BucketTokens, EditBuffers, Flag, StepTokens
from tests.sae_steer.device_host import CPU, SITES, programs

K = 3
ROWS = (Row("sha256:a", 4, "clamp", selector=0), Row("sha256:a", 9), Row("sha256:v", -1, "add", selector=1))
PROGRAM = Program(
    (SiteProgram(SITES[0], ROWS[:1]), SiteProgram(SITES[2], ROWS)), (Selector(Phase.ALL), Selector(Phase.COMPLETION))
)


def make_runs(capacity: int = 4, rows: int = K) -> RunTable:
    return RunTable(len(SITES), rows, CPU, capacity=capacity)


def held_at(runs: RunTable, rows: Tensor, positions: Tensor) -> list[int]:
    """The selectors that hold by position alone, of tokens ``[T]`` at some positions of some rows."""
    count = len(rows)
    request, absolute, known, counted = torch.zeros(4, count, dtype=torch.int64)
    bits, slots = torch.zeros(2, count, dtype=torch.int32)
    ids = torch.zeros(count, dtype=torch.int64)
    any_token = torch.full((int(runs.slot.max()) + 1, 1), -1, dtype=torch.int32)
    step = StepTokens(torch.arange(count + 1), positions, ids, 1, request, absolute, known, bits, None)
    rows = torch.cat([rows, torch.zeros(1, dtype=torch.int64)])
    tables = (runs.slot, runs.seen, runs.starts, runs.masks, runs.reads)
    LAY_OUT.implementation(CPU)(step, [BucketTokens(rows, *tables, any_token, slots, counted)])
    return bits.tolist()


# ------------------------------------------------------------------------------------------- where


@settings(max_examples=80)
@given(
    asked=st.lists(st.tuples(programs(), st.integers(1, 12)), min_size=1, max_size=5),
    where=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=20),
)
def test_the_positions_of_every_selector(asked: list[tuple[Program, int]], where: list[tuple[int, int]]) -> None:
    runs = make_runs(capacity=1)
    added = [runs.add(program, 1, prompt) for program, prompt in asked]
    number = [i % len(asked) for i, _ in where]
    positions = np.array([position for _, position in where])
    held = held_at(runs, torch.tensor([added[i] for i in number]), torch.from_numpy(positions))
    for i, position, mask in zip(number, positions, held, strict=True):
        program, prompt = asked[i]
        by_position = [s.by_position(np.array([position]), prompt)[0] for s in program.selectors]
        assert mask == sum(1 << j for j, holds in enumerate(by_position) if holds)


def test_row_0_holds_nowhere() -> None:
    runs = make_runs()
    runs.add(PROGRAM, 1, 3)
    assert held_at(runs, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 5, 10**6])) == [0, 0, 0]


def test_a_run_of_many_pieces_widens_the_table_for_all() -> None:
    runs = make_runs()
    plain = runs.add(PROGRAM, 1, 3)
    ranges = tuple((4 * i, 4 * i + 2) for i in range(64))
    many = runs.add(Program(PROGRAM.sites, (Selector(Phase.RANGES, ranges), Selector(Phase.ALL))), 2, 3)
    positions = torch.arange(256)
    assert [mask & 1 for mask in held_at(runs, torch.full((256,), many), positions)] == [1, 1, 0, 0] * 64
    assert held_at(runs, torch.full((4,), plain), positions[:4]) == [1, 1, 3, 3]


# ------------------------------------------------------------------------------------------- rows


def test_rows_are_each_run_s_own_and_never_0() -> None:
    runs = make_runs(capacity=2)
    held: list[int] = []
    for number in range(50):
        held.append(runs.add(PROGRAM, 1 + number, 3))
        if number % 3 == 0:
            runs.remove(held.pop(0))
        assert 0 not in held
        assert len(set(held)) == len(held)
    assert runs.slot[held].tolist() == [1 + number for number in range(50)][-len(held) :]
    assert runs.slot.count_nonzero() == len(held)


def test_growing_keeps_what_is_there() -> None:
    runs = make_runs(capacity=1)
    first = runs.add(PROGRAM, 7, 3)
    runs.sums[first] = torch.arange(runs.sums.shape[1])
    runs.seen[first] = 41
    others = [runs.add(PROGRAM, 8, 5) for _ in range(40)]
    assert runs.sums[first].tolist() == list(range(runs.sums.shape[1]))
    assert (int(runs.slot[first]), int(runs.seen[first]), float(runs.fails[first])) == (7, 41, 1.0)
    rows, positions = torch.tensor([first, first, *others]), torch.tensor([1, 2, *[3] * 40])
    assert held_at(runs, rows, positions) == [1, 3, *[1] * 40]


def test_a_row_that_was_given_back_holds_nothing_of_the_last_run() -> None:
    runs = make_runs(capacity=1)
    row = runs.add(PROGRAM, 1, 3)
    runs.sums[row], runs.seen[row] = 5.0, 9
    runs.remove(row)
    assert runs.slot[row] == 0
    short = Program(PROGRAM.sites, (Selector(Phase.ALL),), on_dose="scale")
    assert runs.add(short, 2, 3) == row
    assert not runs.sums[row].any()
    assert (int(runs.slot[row]), int(runs.seen[row]), float(runs.fails[row])) == (2, -1, 0.0)
    assert held_at(runs, torch.tensor([row, row]), torch.tensor([0, 9])) == [1, 1]


# ------------------------------------------------------------------------------------------- sums


@given(program=programs())
def test_the_columns_of_a_program_are_all_of_its_own(program: Program) -> None:
    used = columns(program, SITES, 5)
    assert len(set(used.tolist())) == len(used) == 2 + sum(5 + 4 * len(part.rows) for part in program.sites)
    assert used.max() < make_runs(rows=5).sums.shape[1]
    assert used[:2].tolist() == [TOUCHED, FAILED]


def report(tokens: int = 3) -> tuple[torch.Tensor, EditBuffers]:
    """A step of three tokens in slot 1, at :data:`SITES` 2, where the middle one's dose was passed."""
    select = torch.tensor([[0, 0, 0], [1, 0, 2]], dtype=torch.int32)
    buffers = EditBuffers.empty(tokens=tokens, rows=K, device=CPU)
    buffers.before[:] = torch.tensor([[1.0, 7.0, 0.5], [2.0, 7.0, 0.5], [3.0, 7.0, 0.5]])
    buffers.after[:] = torch.tensor([[1.0, 7.0, 0.5], [0.0, 7.0, 1.5], [0.0, 7.0, 0.5]])
    buffers.dose[:] = torch.tensor([0.25, 0.75, math.inf])
    buffers.flags[:] = int(Flag.TOUCHED)
    buffers.flags[1] |= int(Flag.OVER_DOSE)
    return select, buffers


def count(runs: RunTable, row: list[int], bits: list[int]) -> torch.Tensor:
    select, buffers = report()
    slots = torch.ones(3, dtype=torch.int32)
    bits_of = torch.tensor(bits, dtype=torch.int32)
    return runs.count(torch.tensor([2]), torch.tensor(row), slots, bits_of, select[None], buffers.split(1))


def sums_of(runs: RunTable, row: int, program: Program = PROGRAM) -> Sums:
    return Sums(program, runs.sums[row].numpy()[columns(program, SITES, K)])


def test_sums_by_hand() -> None:
    runs = make_runs()
    row = runs.add(PROGRAM, 1, 3)
    touched = count(runs, [row, row, row], [1, 3, 3])
    runs.count_touched(torch.full((3,), row), touched)
    idle, tally = sums_of(runs, row).tallies()
    assert idle.tokens == 0
    assert idle.part == PROGRAM.sites[0]
    assert (tally.tokens, tally.limited) == (3, 1)
    assert (tally.held.tolist(), tally.fired.tolist()) == ([3, 0, 2], [2, 0, 1])
    assert (tally.before.tolist(), tally.after.tolist()) == ([6.0, 0.0, 1.0], [1.0, 0.0, 2.0])
    assert (tally.dose_sum, tally.dose_max) == (1.0, 0.75)  # a token of length zero has no dose to tell
    assert sums_of(runs, row).touched == 3


def test_what_does_not_count_is_added_to_nobody() -> None:
    runs = make_runs()
    row, other = runs.add(PROGRAM, 1, 3), runs.add(PROGRAM, 1, 3)
    touched = count(runs, [0, row, 0], [3, 3, 3])
    assert touched.tolist() == [True, True, True]  # it was edited all the same
    runs.count_touched(torch.tensor([0, row, 0]), touched)
    assert sums_of(runs, row).tallies()[1].tokens == 1
    assert sums_of(runs, row).touched == 1
    assert not runs.sums[other].any()


FINE, OVER, BROKEN = int(Flag.TOUCHED), int(Flag.TOUCHED | Flag.OVER_DOSE), int(Flag.TOUCHED | Flag.NON_FINITE)


@pytest.mark.parametrize(
    ("flags", "on_dose", "failure"),
    [
        ([FINE, FINE], "fail", None),
        ([FINE, OVER], "fail", DoseExceeded),
        ([FINE, OVER], "scale", None),
        ([BROKEN, FINE], "fail", NonFinite),
        ([BROKEN, FINE], "scale", NonFinite),
        ([BROKEN, OVER], "fail", NonFinite),
    ],
)
def test_what_ends_a_request(flags: list[int], on_dose: Any, failure: type[Exception] | None) -> None:
    program = Program(PROGRAM.sites, PROGRAM.selectors, dose_limit=0.5, on_dose=on_dose)
    runs = make_runs()
    row, other = runs.add(program, 1, 3), runs.add(program, 1, 3)
    select, buffers = report()
    buffers.flags[:] = torch.tensor([*flags, FINE])
    slots, bits = torch.ones(3, dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32)
    runs.count(torch.tensor([2]), torch.tensor([row, row, other]), slots, bits, select[None], buffers.split(1))
    runs.judge(torch.tensor([row, other]))
    found = sums_of(runs, row, program)
    assert (type(found.failure) if found.failure is not None else None) is failure
    assert (found.values[FAILED] > 0) == (failure is not None)
    assert sums_of(runs, other, program).failure is None
    assert sums_of(runs, other, program).values[FAILED] == 0
    if failure is not None:
        assert str(SITES[2]) in str(found.failure)
    if failure is DoseExceeded:
        assert "0.75" in str(found.failure)


def test_one_that_could_not_be_loaded_stays_failed() -> None:
    runs = make_runs()
    row = runs.add(PROGRAM, 0, 3)
    runs.sums[row, FAILED] = 1.0
    runs.judge(torch.tensor([row]))
    failure = sums_of(runs, row).failure
    assert failure is not None
    assert failure.code == "request_failed"
    assert "could not load" in failure.message
