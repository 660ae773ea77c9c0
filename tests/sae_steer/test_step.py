"""The token -> slot map: who has which slot and which selectors, token by token of a step."""

import numpy as np
import pytest
import torch

from sae_steer.errors import NonFinite
from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.report import Run
from sae_steer.sites import Site
from sae_steer.slots import Slot
from sae_steer.step import Span, StepMap

ROWS = (Row("sha256:a", 1, "ablate", selector=0), Row("sha256:a", 2, "ablate", selector=1))
PROGRAM = Program(
    (SiteProgram(Site.parse("resid_post.1"), ROWS),), (Selector(Phase.PROMPT), Selector(Phase.ALL, skip_token=9))
)
CPU = torch.device("cpu")


def run_in(bucket: int, index: int, prompt_length: int = 3) -> Run:
    return Run(PROGRAM, Slot(bucket, index), prompt_length)


def test_spans_are_laid_out_one_after_the_other() -> None:
    step = StepMap(2, CPU, capacity=16)
    narrow, wide = run_in(0, 2), run_in(1, 3)
    step.fill([Span(None, 0, [1, 1]), Span(narrow, 0, [9, 1, 1, 1]), Span(wide, 2, [1, 9]), Span(None, 5, [1])])
    assert step.tokens == 9
    assert step.slots[0].tolist() == [0, 0, 2, 2, 2, 2, 0, 0, 0, *[0] * 7]
    assert step.slots[1].tolist() == [0, 0, 0, 0, 0, 0, 3, 0, 0, *[0] * 7]
    assert step.bits.tolist() == [0, 0, 1, 3, 2, 2, 2, 0, 0, *[0] * 7]
    assert [(p.run, p.first, p.positions.tolist()) for p in step.placed] == [
        (narrow, 2, [0, 1, 2, 3]),
        (wide, 6, [2, 3]),
    ]
    assert step.slots[0].dtype == step.bits.dtype == torch.int32


@pytest.mark.parametrize("spans", [[], [Span(None, 0, [1, 2])], [Span(run_in(0, 1), 0, [])]])
def test_steps_that_nobody_steers(spans: list[Span]) -> None:
    step = StepMap(1, CPU, capacity=4)
    step.fill(spans)
    assert step.placed == []
    assert not step.slots[0].any()
    assert not step.bits.any()


def test_a_run_none_of_whose_tokens_hold_is_not_placed() -> None:
    step = StepMap(1, CPU, capacity=4)
    step.fill([Span(run_in(0, 1), 5, [9, 9])])
    assert step.placed == []


def test_a_run_that_failed_has_no_slot_any_more() -> None:
    step = StepMap(1, CPU, capacity=8)
    failed, other = run_in(0, 1), run_in(0, 2)
    failed.failure = NonFinite("no")
    step.fill([Span(failed, 0, [1, 1]), Span(other, 0, [1, 1])])
    assert step.slots[0].tolist() == [0, 0, 2, 2, 0, 0, 0, 0]
    assert step.bits.tolist()[:2] == [0, 0]
    assert [p.run for p in step.placed] == [other]


def test_nothing_of_the_last_step_is_left() -> None:
    step = StepMap(2, CPU, capacity=8)
    step.fill([Span(run_in(0, 1), 0, [1] * 8)])
    step.clear()
    assert step.placed == []
    assert step.tokens == 0
    assert not step.slots[0].any()
    step.fill([Span(None, 0, [1]), Span(run_in(1, 2), 0, [1])])
    assert not step.slots[0].any()
    assert step.slots[1].tolist() == [0, 2, 0, 0, 0, 0, 0, 0]
    assert step.bits.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]


def test_laying_out_twice_leaves_nothing_of_the_first() -> None:
    step = StepMap(1, CPU, capacity=4)
    step.fill([Span(run_in(0, 1), 0, [1] * 4)])
    step.fill([Span(None, 0, [1] * 4)])
    assert not step.slots[0].any()
    assert step.placed == []


@pytest.mark.parametrize("tokens", [5, 8, 9, 100])
def test_the_map_grows_and_keeps_its_meaning(tokens: int) -> None:
    step = StepMap(2, CPU, capacity=4)
    step.fill([Span(run_in(0, 1), 0, [1] * 4)])
    step.clear()
    step.fill([Span(None, 0, [1]), Span(run_in(1, 1), 0, [1] * (tokens - 1))])
    assert step.capacity >= tokens
    for held in (*step.slots, step.bits):
        assert held.shape == (step.capacity,)
    assert step.slots[1].tolist() == [0, *[1] * (tokens - 1), *[0] * (step.capacity - tokens)]
    assert not step.slots[0].any()
    smaller = step.capacity
    step.clear()
    step.fill([Span(run_in(0, 1), 0, [1])])
    assert step.capacity == smaller
    assert int(step.slots[0].sum()) == 1


def test_the_buffers_stay_where_they_are_while_they_fit() -> None:
    """A captured graph reads them by address."""
    step = StepMap(1, CPU, capacity=8)
    places = [step.slots[0].data_ptr(), step.bits.data_ptr()]
    for count in (3, 8, 1):
        step.fill([Span(run_in(0, 1), 0, [1] * count)])
        step.clear()
    assert [step.slots[0].data_ptr(), step.bits.data_ptr()] == places


def test_placed_knows_the_bits_of_each_token() -> None:
    step = StepMap(1, CPU, capacity=8)
    step.fill([Span(run_in(0, 1), 1, [1, 9, 1])])
    (placed,) = step.placed
    assert placed.bits.tolist() == [3, 0, 2]
    assert placed.bits.dtype == np.int32
