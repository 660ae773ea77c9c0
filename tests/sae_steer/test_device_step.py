"""The map and the sums of the device against the classes of the host: every batch, chunk, preemption and padding."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.device_step import BatchRows, DeviceStep
from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.runs import RunTable
from sae_steer_kernels import LAY_OUT
from tests.kernels.properties.providers import provider
from tests.sae_steer.device_host import BUCKETS, CPU, SITES, VOCABULARY, Asked, Batch, Sides, batches, requests


@pytest.mark.parametrize("layout", ["torch", "numba"])
@settings(max_examples=60)
@given(requests=requests, steps=st.lists(batches, min_size=1, max_size=12))
def test_the_device_says_what_the_host_says(layout: str, requests: list[Asked], steps: list[Batch]) -> None:
    with provider(LAY_OUT, layout):
        sides = Sides()
    for batch in steps:
        sides.play(requests, batch)


# ------------------------------------------------------------------------------------------- wrong variants


class LosesSums(RunTable):
    """Grows without what the smaller table held."""

    def _allocate(self, size: int, pieces: int) -> None:
        super()._allocate(size, pieces)
        self.sums.zero_()


class KeepsSums(RunTable):
    """Gives a row to the next request as the last one left it."""

    def add(self, program: Program, slot: int, prompt_length: int) -> int:
        kept = self.sums.clone()
        row = super().add(program, slot, prompt_length)
        self.sums[row, : kept.shape[1]] = kept[row] if row < kept.shape[0] else 0
        return row


class KeepsSelectors(DeviceStep):
    """Leaves a slot what the program before asked of token ids."""

    def load(self, bucket: int, slot: int, program: Program) -> None:
        if bool((self._by_token[bucket][slot] == -1).all()):
            super().load(bucket, slot, program)


class CountsTwice(DeviceStep):
    """Forgets how far each request has come, and counts again what is computed again."""

    def fill(self, *args: Any, **more: Any) -> None:
        for run in self.runs:
            run.seen.fill_(-1)
        super().fill(*args, **more)


class ForgetsNewest(DeviceStep):
    """Takes the position of the last token for one that was seen already."""

    def fill(self, *args: Any, **more: Any) -> None:
        super().fill(*args, **more)
        for run in self.runs:
            run.seen += run.seen >= 0


class OffByOne(DeviceStep):
    def fill(self, batch: Any, starts: Any, positions: Any, ids: Any, count: int, *rest: Any, **more: Any) -> None:
        super().fill(batch, starts, positions + 1, ids, count, *rest, **more)


class OneTokenIsCompletion(DeviceStep):
    """Tells the phase from the size of a request's step."""

    def fill(self, batch: Any, starts: Any, positions: Any, ids: Any, count: int, *rest: Any, **more: Any) -> None:
        positions = positions.clone()
        for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            if b - a == 1:
                positions[a] += 10
        super().fill(batch, starts, positions, ids, count, *rest, **more)


class BelievesTheHost(DeviceStep):
    """Takes the host's count for where the last request ends."""

    def fill(self, batch: Any, starts: Any, positions: Any, ids: Any, count: int, *rest: Any, **more: Any) -> None:
        starts = starts.clone()
        starts[max((len(own.rows) - 1 for own in batch if own), default=0) :] = count
        super().fill(batch, starts, positions, ids, count, *rest, **more)


class CountsPadding(DeviceStep):
    """Takes a padded row of the query starts for a request."""

    def fill(self, batch: Any, starts: Any, positions: Any, ids: Any, count: int, *rest: Any, **more: Any) -> None:
        super().fill(
            [own and self._padded(own, len(starts)) for own in batch], starts, positions, ids, count, *rest, **more
        )

    def _padded(self, own: BatchRows, size: int) -> BatchRows:
        last, nobody = own.rows[-2:-1], own.rows[-1:]
        return BatchRows(torch.cat([own.rows[:-1], last.expand(size - len(own.rows)), nobody]), own.own)


class NeverClears(DeviceStep):
    def clear(self) -> None:
        self.tokens = 0


class CountsEverySite(DeviceStep):
    """Takes what an earlier pass left at a site for what this one did there."""

    def _count_few(self) -> None:
        for edited in self._edited:
            if edited:
                edited[:] = range(len(SITES))
        super()._count_few()


class CountsTheLast(DeviceStep):
    """Has one place for the reports of all sites, and counts at the end of the step."""

    def reports(self, site: int, rows: int) -> Any:
        return super().reports(0, rows)


WRONG_RUNS = [LosesSums, KeepsSums]
WRONG_STEPS = [
    CountsTwice,
    ForgetsNewest,
    KeepsSelectors,
    OffByOne,
    OneTokenIsCompletion,
    BelievesTheHost,
    CountsPadding,
    NeverClears,
]
WRONG_STEPS += [CountsEverySite, CountsTheLast]


@pytest.mark.parametrize("wrong", [*WRONG_RUNS, *WRONG_STEPS], ids=lambda wrong: wrong.__name__)
def test_wrong_variants_do_not_pass(wrong: Any) -> None:
    variant = {"make_runs": wrong} if wrong in WRONG_RUNS else {"make_step": wrong}

    @settings(max_examples=1000, phases=[Stage.generate])
    @given(requests=requests, steps=st.lists(batches, min_size=1, max_size=12))
    def play(requests: list[Asked], steps: list[Batch]) -> None:
        sides = Sides(**variant)
        for batch in steps:
            sides.play(requests, batch)

    with pytest.raises(AssertionError):
        play()


# ------------------------------------------------------------------------------------------- by hand

ROWS = (Row("sha256:a", 1, "ablate", selector=0), Row("sha256:a", 2, "ablate", selector=1))
PROGRAM = Program((SiteProgram(SITES[0], ROWS),), (Selector(Phase.PROMPT), Selector(Phase.ALL, skip_token=5)))


def make_step() -> tuple[DeviceStep, int]:
    """A step whose slot 2 holds the program, and the row of a run of it with three prompt tokens."""
    step = DeviceStep(BUCKETS, sites=SITES, capacity=8, vocabulary=VOCABULARY, device=CPU)
    step.load(0, 2, PROGRAM)
    return step, step.runs[0].add(PROGRAM, 2, 3)


def fill(
    step: DeviceStep, rows: list[int], starts: list[int], positions: list[int], ids: list[int], count: int
) -> None:
    own = np.array(rows, dtype=np.int64)
    step.fill([BatchRows.of(own, CPU), None], torch.tensor(starts), torch.tensor(positions), torch.tensor(ids), count)


def test_where_each_token_is() -> None:
    step, row = make_step()
    fill(step, [0, row, 0], [0, 2, 6, 7], [0, 1, 0, 1, 2, 3, 9], [1, 1, 5, 1, 1, 1, 1], 7)
    assert step.slots[0].tolist() == [0, 0, 2, 2, 2, 2, 0, 0]
    assert step.bits[:7].tolist() == [0, 0, 1, 3, 2, 2, 0]
    assert not step.slots[1].any()
    assert step.slots[0].dtype == step.bits.dtype == torch.int32


def test_tokens_are_grouped_where_kernels_edit() -> None:
    step = DeviceStep(BUCKETS, sites=SITES, capacity=8, vocabulary=VOCABULARY, device=CPU, widths=[(4, 4), (8, 4)])
    step.load(0, 2, PROGRAM)
    row = step.runs[0].add(PROGRAM, 2, 3)
    assert make_step()[0].groups == ()
    fill(step, [0, row, 0], [0, 2, 6, 7], [0, 1, 0, 1, 2, 3, 9], [1, 1, 5, 1, 1, 1, 1], 7)
    tiles = [tile for tile in step.groups[0].tiles.tolist() if tile[0] == 2]
    assert [step.groups[0].order[start:end].tolist() for _, start, end in tiles] == [[2, 3, 4, 5]]
    assert not step.groups[1].tiles[:, 0].any()
    step.clear()
    assert not step.groups[0].tiles.any()


def test_steps_that_nobody_steers() -> None:
    step, row = make_step()
    fill(step, [row], [0, 4], [0, 1, 2, 3], [1] * 4, 4)
    fill(step, [0, 0], [0, 2, 4], [0, 1, 0, 1], [1] * 4, 4)
    assert step.tokens == 0
    assert not step.slots[0].any()
    assert step.finish() is None


def test_a_pass_that_is_not_laid_out_sees_nothing_of_the_last() -> None:
    step, row = make_step()
    fill(step, [row], [0, 8], list(range(8)), [1] * 8, 8)
    assert step.slots[0].all()
    step.clear()
    assert not step.slots[0].any()
    assert step.finish() is None


def test_where_the_device_has_fewer_tokens_than_the_host_hoped() -> None:
    """Starts that moved, positions that fell back: what lies beyond them is nobody's."""
    step, row = make_step()
    fill(step, [row, 0], [0, 2, 3], [1, 2, 0, 5, 5, 5, 5, 5], [1] * 8, 8)
    assert step.slots[0].tolist() == [2, 2, 0, 0, 0, 0, 0, 0]
    assert step.bits[:3].tolist() == [3, 2, 0]


def test_token_ids_beyond_the_vocabulary_are_those_of_nothing() -> None:
    """Padding may hold anything; such an id must not be read beside the table."""
    step, row = make_step()
    fill(step, [row], [0, 3], [0, 1, 2], [-1, 10**6, 1], 3)
    assert step.slots[0].tolist()[:3] == [2, 2, 2]


def test_the_buffers_stay_where_they_are() -> None:
    """A captured graph reads them by address."""
    step, row = make_step()
    places = [t.data_ptr() for t in (*step.slots, step.bits)]
    for count in (3, 8, 1):
        fill(step, [row], [0, count], list(range(count)), [1] * count, count)
        step.clear()
    assert [t.data_ptr() for t in (*step.slots, step.bits)] == places


def test_tokens_that_another_stage_touched() -> None:
    step, row = make_step()
    fill(step, [0, row], [0, 1, 4], [5, 0, 1, 2], [1] * 4, 4)
    told = step.finish(torch.tensor([False, True, False, True]))
    assert told is not None
    assert told.tolist() == [False, True, False, True]
    assert step.runs[0].sums[row, 0] == 2
    assert step.runs[0].seen[row] == 2  # since it was laid out
