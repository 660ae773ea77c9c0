"""A host that lays out its steps twice, on the host and on the device, and compares all that the two then say."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from sae_steer.device_step import BatchRows, DeviceStep
from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.report import Run, applied_block
from sae_steer.runs import RunTable, Sums, columns
from sae_steer.sites import Site
from sae_steer.slots import Bucket, Slot, SlotPool
from sae_steer.step import Span, StepMap
from sae_steer_kernels import Flag

CPU = torch.device("cpu")
SITES = tuple(Site.parse(name) for name in ("resid_post.0", "resid_mid.1", "resid_post.1"))
BUCKETS = (Bucket(2, 3), Bucket(1, 5))
CAPACITY = 48
VOCABULARY = 8

# ------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Asked:
    """A request: what steers it (None = nothing), and how long its prompt is."""

    program: Program | None
    prompt: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A request in a step: first taken ``back`` positions, then ``count`` tokens are computed; none = it leaves."""

    request: int
    count: int
    back: int = 0


@dataclass(frozen=True)
class Batch:
    """A step, and how much more of everything the host's own numbers speak of."""

    parts: tuple[Part, ...]
    rows_beyond: int = 0
    tokens_beyond: int = 0


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    phase = draw(st.sampled_from(Phase))
    edges = sorted(draw(st.sets(st.integers(0, 12), min_size=2, max_size=6)))
    ranges = tuple(zip(edges[::2], edges[1::2], strict=False)) if phase is Phase.RANGES else ()
    tokens = st.none() | st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3).map(tuple)
    return Selector(phase, ranges, draw(st.none() | st.just(1)), draw(tokens))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    held = draw(st.lists(selectors(), min_size=1, max_size=4, unique=True))
    numbers = st.integers(-1, len(held) - 1)
    sites = draw(st.sets(st.sampled_from(range(len(SITES))), min_size=1))
    parts = [
        SiteProgram(SITES[i], tuple(Row("sha256:a", n, "add", selector=s) for n, s in enumerate(rows)))
        for i in sorted(sites)
        for rows in [draw(st.lists(numbers, min_size=1, max_size=5))]
    ]
    limit = draw(st.sampled_from([float("inf"), 0.5]))
    return Program(tuple(parts), tuple(held), limit, draw(st.sampled_from(["fail", "scale"])))


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=16, max_size=16).map(tuple)
requests = st.lists(st.builds(Asked, st.none() | programs(), st.integers(1, 8), tokens), min_size=1, max_size=6)
parts = st.builds(Part, st.integers(0, 5), st.sampled_from([0, 1, 1, 2, 5]), st.sampled_from([0, 0, 0, 3, 16]))
batches = st.builds(
    Batch,
    st.lists(parts, max_size=5, unique_by=lambda part: part.request).map(tuple),
    st.integers(0, 2),
    st.integers(0, 3),
)

# ------------------------------------------------------------------------------------------- both sides


@dataclass
class Live:
    """A request that runs, as both sides know it."""

    asked: Asked
    run: Run | None = None
    row: int = 0
    done: int = 0


@dataclass
class Sides:
    """A host that lays out its steps twice, has one kernel report to both, and compares all that they then say."""

    make_step: Callable[..., DeviceStep] = DeviceStep
    make_runs: Callable[..., RunTable] = RunTable

    def __post_init__(self) -> None:
        self.step = self.make_step(
            BUCKETS, sites=SITES, capacity=CAPACITY, vocabulary=VOCABULARY, device=CPU, few=CAPACITY // 4
        )
        # One run fits: from the second on, the tables grow under those that are there.
        self.step.runs = tuple(self.make_runs(len(SITES), bucket.rows, CPU, capacity=1) for bucket in BUCKETS)
        self.truth = StepMap(len(BUCKETS), CPU, CAPACITY)
        self.pool = SlotPool(BUCKETS)
        self.live: dict[int, Live] = {}
        self.rows = 0  # of the forward pass
        self.selects = [[torch.zeros(b.slots + 1, b.rows, dtype=torch.int32) for b in BUCKETS] for _ in SITES]

    def join(self, number: int, asked: Asked) -> bool:
        """Lets a request in; one whose program finds no slot waits."""
        live = Live(asked)
        if asked.program is not None:
            found = self.pool.acquire(asked.program.digest, asked.program.rows)
            if found is None:
                return False
            if found[1]:
                self.load(asked.program, found[0])
            live.run = Run(asked.program, found[0], asked.prompt)
            live.row = self.step.runs[found[0].bucket].add(asked.program, found[0].index, asked.prompt)
        self.live[number] = live
        return True

    def load(self, program: Program, slot: Slot) -> None:
        self.step.load(slot.bucket, slot.index, program)
        for site, selects in zip(SITES, self.selects, strict=True):
            select = selects[slot.bucket][slot.index]
            select.zero_()
            for part in program.sites:
                if part.site == site:
                    masks = [1 << row.selector if row.selector >= 0 else 0 for row in part.rows]
                    select[: len(masks)] = torch.tensor(masks)

    def leave(self, number: int) -> None:
        live = self.live.pop(number)
        if live.run is not None:
            self.pool.release(live.run.program.digest)
            self.step.runs[live.run.slot.bucket].remove(live.row)

    def play(self, requests: Sequence[Asked], batch: Batch) -> None:
        """One step of the requests of a batch."""
        chunks: list[tuple[int, Live, int, int]] = []
        for part in batch.parts:
            number = part.request % len(requests)
            if any(number == other for other, *_ in chunks):
                continue
            if part.count == 0:
                if number in self.live:
                    self.leave(number)
                continue
            if number not in self.live and not self.join(number, requests[number]):
                continue
            live = self.live[number]
            start = max(live.done - part.back, 0)
            count = min(part.count, len(live.asked.tokens) - start)
            live.done = start + count
            chunks.append((number, live, start, count))
        self.forward(chunks, batch)

    def forward(self, chunks: list[tuple[int, Live, int, int]], batch: Batch) -> None:
        self.lay_out(chunks, batch)
        total = sum(count for *_, count in chunks)
        for slots, expected in zip(self.step.slots, self.truth.slots, strict=True):
            assert torch.equal(slots, expected)
        placed = bool(self.truth.placed)
        if placed:
            assert torch.equal(self.step.bits[:total], self.truth.bits[:total])
        touched = np.zeros(CAPACITY, dtype=np.bool_)
        for number in range(len(SITES)):
            self.edit(number, chunks, touched)
        told = self.step.finish()
        if placed:
            assert told is not None
            assert told[:total].tolist() == touched[:total].tolist()
            assert not told[total:].any()
        for p in self.truth.placed:
            p.run.touch(p.positions, touched[p.first : p.first + p.positions.size])
        self.step.clear()
        self.truth.clear()
        assert not any(slots.any() for slots in self.step.slots)  # what a pass that is not laid out would see
        for number, live, *_ in chunks:
            self.compare(live)
            if live.run is not None and live.run.failure is not None:
                self.leave(number)

    def lay_out(self, chunks: list[tuple[int, Live, int, int]], batch: Batch) -> None:
        """The host's side gets what is so; the device's gets tensors with more in them, and the host's hopes."""
        self.truth.fill(
            [Span(live.run, start, live.asked.tokens[start : start + count]) for _, live, start, count in chunks]
        )
        ends = np.cumsum([0, *(count for *_, count in chunks)])
        starts = np.append(ends, [ends[-1] + batch.tokens_beyond] * batch.rows_beyond)
        positions = np.full(CAPACITY, 7)  # beyond the batch is what an earlier step left there
        ids = np.full(CAPACITY, 3)
        for end, (_, live, start, count) in zip(ends[1:], chunks, strict=True):
            positions[end - count : end] = np.arange(start, start + count)
            ids[end - count : end] = live.asked.tokens[start : start + count]
        rows = [
            np.array([live.row if live.run and live.run.slot.bucket == b else 0 for _, live, *_ in chunks], np.int64)
            for b in range(len(BUCKETS))
        ]
        count = self.rows = int(ends[-1]) + batch.tokens_beyond
        laid = [BatchRows.of(own, CPU) for own in rows]
        self.step.fill(
            laid, torch.tensor(starts, dtype=torch.int32), torch.tensor(positions), torch.tensor(ids).int(), count
        )

    def edit(self, number: int, chunks: list[tuple[int, Live, int, int]], touched: np.ndarray) -> None:
        """What the kernel reports of one site, by a rule of request and position, to both sides."""
        site = SITES[number]
        here = [p for p in self.truth.placed if p.run.tally(site) is not None]
        for bucket in {p.run.slot.bucket for p in here}:
            buffers = self.step.reports(number, self.rows)[bucket]
            buffers.before.fill_(float("nan"))  # of tokens without a slot nothing may be read
            buffers.after.fill_(float("nan"))
            buffers.flags.zero_()
            buffers.dose.zero_()
            for p in (p for p in here if p.run.slot.bucket == bucket):
                self.report(number, p.run, p, chunks)
            self.step.edited(number, [bucket], self.rows)
            before, after, dose, flags = (
                t.numpy() for t in (buffers.before, buffers.after, buffers.dose, buffers.flags)
            )
            for p in (p for p in here if p.run.slot.bucket == bucket):
                cut = slice(p.first, p.first + p.positions.size)
                tally = p.run.tally(site)
                assert tally is not None
                tally.add(p.positions, p.bits, before[cut], after[cut], dose[cut], flags[cut])
                p.run.judge(site, flags[cut], dose[cut])
                touched[cut] |= flags[cut] != 0

    def report(self, site: int, run: Run, placed: Any, chunks: list[tuple[int, Live, int, int]]) -> None:
        request = next(number for number, live, *_ in chunks if live.run is run)
        buffers = self.step.reports(site, self.rows)[run.slot.bucket]
        select = self.selects[site][run.slot.bucket][run.slot.index].numpy()
        for i, (position, bits) in enumerate(zip(placed.positions.tolist(), placed.bits.tolist(), strict=True)):
            if not bits:
                continue
            rng, t = random.Random(f"{request} {site} {position}"), placed.first + i
            width = buffers.before.shape[1]
            # Eighths, whose sums are exact in any order; a third of the edits that hold change nothing.
            buffers.before[t] = torch.tensor([rng.randrange(32) / 8 for _ in range(width)])
            change = [rng.choice([0, 1, 2]) / 8 if bits & mask else 0.0 for mask in select.tolist()]
            buffers.after[t] = buffers.before[t] + torch.tensor(change)
            if not (bits & select).any():
                continue
            dose = rng.randrange(5) / 8 if rng.random() < 0.97 else 0.75
            dose = float("inf") if dose == 0.75 and run.program.dose_limit > 1 else dose
            broken = rng.random() < 0.01
            over = dose > run.program.dose_limit
            buffers.dose[t] = dose
            buffers.flags[t] = int(Flag.TOUCHED) + over * int(Flag.OVER_DOSE) + broken * int(Flag.NON_FINITE)

    def compare(self, live: Live) -> None:
        if live.run is None:
            return
        program, runs = live.run.program, self.step.runs[live.run.slot.bucket]
        runs.judge(torch.tensor([live.row]))
        used = columns(program, SITES, runs.rows)
        sums = Sums(program, runs.sums[live.row].numpy()[used])
        here = applied_block(sums.tallies(), sums.touched, lambda _, source: source)
        assert here == live.run.report(lambda _, source: source)
        assert repr(sums.failure) == repr(live.run.failure)
        assert (sums.values[1] > 0) == (live.run.failure is not None)
