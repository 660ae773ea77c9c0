"""Slots of steered requests: who waits, in which order, and when a slot is free again."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
import torch

from sae_steer.errors import CheckpointError, DoseExceeded, NonFinite, RunFailed
from sae_steer.program import Program
from sae_steer.runtime import StepSummary
from sae_steer.slots import Slot
from sae_steer.step import Span
from sae_steer_server.engine.steps import Part, Steps
from tests.server.engine_host import Host, ask, greedy, sampled, serving

PROMPT = [256, 70, 71, 72, 73]


class Numbers:
    """Metrics that keep what they are told."""

    def __init__(self) -> None:
        self.summaries: list[StepSummary] = []
        self.running: list[int] = []
        self.in_use: list[int] = []
        self.waited: list[int] = []

    def step(self, summary: StepSummary, running: int) -> None:
        self.summaries.append(summary)
        self.running.append(running)

    def slots(self, in_use: int) -> None:
        self.in_use.append(in_use)

    def waiting(self, n: int) -> None:
        self.waited.append(n)


class Watch:
    """Records which program each slot was given, and checks each step's spans against it."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.wrong: list[str] = []
        self._owner: dict[Slot, str] = {}
        acquire, begin = host.runtime.acquire, host.runtime.begin_step

        def acquiring(program: Program) -> Slot | None:
            slot = acquire(program)
            if slot is not None:
                self.order.append(program.digest)
                self._owner[slot] = program.digest
            return slot

        def beginning(spans: Sequence[Span]) -> None:
            runs = [span.run for span in spans if span.run is not None]
            self.wrong += [run.program.digest for run in runs if self._owner[run.slot] != run.program.digest]
            begin(spans)

        monkeypatch.setattr(host.runtime, "acquire", acquiring)
        monkeypatch.setattr(host.runtime, "begin_step", beginning)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def test_waiting_is_in_order_and_for_the_steered_only(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers()

    async def scenario() -> None:
        async with serving(slots=1, metrics=numbers) as host:
            programs = [host.program(float(value)) for value in (1, 2, 3, 1, 4)]
            held = host.program(9.0)
            assert host.runtime.acquire(held) is not None
            watch = Watch(host, monkeypatch)
            tasks = []
            for program in programs:
                tasks.append(asyncio.create_task(ask(host.engine, PROMPT, greedy(5), program)))
                await until(lambda: numbers.waited[-1:] == [len(tasks)])
            plain = await ask(host.engine, PROMPT, greedy(5))
            assert len(plain.tokens) == 5
            assert numbers.waited[-1] == 5
            assert watch.order == []
            host.engine._admission.release(held)
            await asyncio.gather(*tasks)
            assert watch.order == [program.digest for program in programs]
            assert watch.wrong == []
            await host.settled()
            assert numbers.in_use[-1] == numbers.waited[-1] == 0
            assert max(numbers.in_use) == 1

    asyncio.run(scenario())


def test_who_is_cancelled_while_waiting_owes_nothing() -> None:
    async def scenario() -> None:
        async with serving(slots=1) as host:
            held = host.program(9.0)
            host.runtime.acquire(held)
            first, second, third = [
                asyncio.create_task(ask(host.engine, PROMPT, greedy(5), host.program(float(value))))
                for value in (1, 2, 3)
            ]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            first.cancel()
            host.engine._admission.release(held)  # the first is served in the turn in which it is cancelled
            third.cancel()
            answer = await second
            assert len(answer.tokens) == 5
            assert {type(r) for r in await asyncio.gather(first, third, return_exceptions=True)} == {
                asyncio.CancelledError
            }
            await host.settled()

    asyncio.run(scenario())


def test_a_program_that_cannot_be_loaded_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(slots=1) as host:
            acquire, broken = host.runtime.acquire, host.program(2.0)

            def acquiring(program: Program) -> Slot | None:
                if program == broken:
                    raise CheckpointError("the file is gone")
                return acquire(program)

            monkeypatch.setattr(host.runtime, "acquire", acquiring)
            with pytest.raises(CheckpointError, match="gone"):
                await ask(host.engine, PROMPT, greedy(5), broken)
            assert (await ask(host.engine, PROMPT, greedy(5), host.program(1.0))).chunks

    asyncio.run(scenario())


def test_a_reader_who_leaves_frees_the_slot_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(slots=1) as host:
            programs = [host.program(float(value)) for value in range(1, 7)]
            expected = [(await ask(host.engine, PROMPT, sampled(15, 4), program)).tokens for program in programs]
            plain = (await ask(host.engine, PROMPT, greedy(150))).tokens
            await host.settled()
            watch = Watch(host, monkeypatch)
            bystander = asyncio.create_task(ask(host.engine, PROMPT, greedy(150)))
            for i, program in enumerate(programs[:-1]):
                leaving = host.engine.generate(PROMPT, program, sampled(200, 4))
                for _ in range(i):  # 0: before it has begun
                    await anext(leaving)
                follower = asyncio.create_task(ask(host.engine, PROMPT, sampled(15, 4), programs[i + 1]))
                await asyncio.sleep(0)
                await leaving.aclose()
                assert (await follower).tokens == expected[i + 1]
            assert (await bystander).tokens == plain
            assert watch.wrong == []
            await host.settled()

    asyncio.run(scenario())


def test_a_reader_whose_task_is_cancelled_frees_the_slot() -> None:
    async def scenario() -> None:
        async with serving(slots=1) as host:
            for wait in (0, 1, 3, 10):
                task = asyncio.create_task(ask(host.engine, PROMPT, greedy(200), host.program(float(wait))))
                for _ in range(wait):
                    await asyncio.sleep(0.002)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await host.settled()
            assert (await ask(host.engine, PROMPT, greedy(5), host.program(1.0))).chunks

    asyncio.run(scenario())


def test_a_cancellation_that_the_scheduler_forgot_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(slots=1) as host:
            cancel, forgotten = host.engine._batch.cancel, []

            def forgetful(id_: str) -> None:
                if forgotten:
                    cancel(id_)
                forgotten.append(id_)

            monkeypatch.setattr(host.engine._batch, "cancel", forgetful)
            leaving = host.engine.generate(PROMPT, host.program(1.0), greedy(250))
            await anext(leaving)
            await leaving.aclose()
            assert (await ask(host.engine, PROMPT, greedy(5), host.program(2.0))).chunks
            assert len(forgotten) >= 2

    asyncio.run(scenario())


def test_a_run_that_fails_ends_alone() -> None:
    async def scenario() -> None:
        async with serving(slots=2) as host:
            plain, steered = greedy(40), host.program(1.0)
            expected = await ask(host.engine, PROMPT, plain), await ask(host.engine, PROMPT, plain, steered)
            failing = host.program(5.0, dose={"limit": 0.01, "on_dose": "fail"})
            one, two, failed, three = await asyncio.gather(
                ask(host.engine, PROMPT, plain),
                ask(host.engine, PROMPT, plain, steered),
                ask(host.engine, PROMPT, plain, failing),
                ask(host.engine, PROMPT, plain, steered),
                return_exceptions=True,
            )
            assert isinstance(failed, DoseExceeded)
            assert [one.tokens, two.tokens, three.tokens] == [expected[0].tokens, *[expected[1].tokens] * 2]
            await host.settled()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["begin_step", "end_step"])
def test_an_internal_error_ends_the_steered_alone(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    async def scenario() -> None:
        async with serving(slots=2) as host:
            plain = (await ask(host.engine, PROMPT, greedy(30))).tokens
            steered = (await ask(host.engine, PROMPT, greedy(30), host.program(1.0))).tokens
            works = getattr(host.runtime, method)

            def broken(*spans: Sequence[Span]) -> StepSummary | None:
                if host.runtime.slots_in_use and (not spans or any(span.run for span in spans[0])):
                    raise ZeroDivisionError("a bug")
                return works(*spans)

            monkeypatch.setattr(host.runtime, method, broken)
            unharmed, failed = await asyncio.gather(
                ask(host.engine, PROMPT, greedy(30)),
                ask(host.engine, PROMPT, greedy(30), host.program(1.0)),
                return_exceptions=True,
            )
            assert unharmed.tokens == plain
            assert isinstance(failed, RunFailed)
            assert "ZeroDivisionError" in failed.message
            await host.settled()
            monkeypatch.undo()
            assert (await ask(host.engine, PROMPT, greedy(30), host.program(1.0))).tokens == steered

    asyncio.run(scenario())


def test_what_is_not_finite_ends_its_request_alone() -> None:
    async def scenario() -> None:
        async with serving() as host:
            expected = (await ask(host.engine, PROMPT, sampled(20, 1))).tokens
            poison = next(token for token in range(256) if token not in expected + PROMPT)
            with torch.no_grad():
                host.model.get_input_embeddings().weight[poison] = torch.nan
            good, *bad = await asyncio.gather(
                ask(host.engine, PROMPT, sampled(20, 1)),
                ask(host.engine, [*PROMPT, poison], sampled(20, 1)),
                ask(host.engine, [*PROMPT, poison], greedy(20)),
                ask(host.engine, [poison, *PROMPT], greedy(20)),  # its last row is finite: attention got zeros
                return_exceptions=True,
            )
            assert good.tokens == expected
            assert [type(each) for each in bad] == [NonFinite] * 3

    asyncio.run(scenario())


def test_logits_that_are_not_finite_end_their_request() -> None:
    async def scenario() -> None:
        async with serving() as host:
            handle = host.model.lm_head.register_forward_hook(lambda _, args, output: output * torch.nan)
            for sampling in (greedy(5), sampled(5, 1)):
                with pytest.raises(NonFinite):
                    await ask(host.engine, PROMPT, sampling)
            handle.remove()
            assert (await ask(host.engine, PROMPT, greedy(5))).chunks

    asyncio.run(scenario())


def test_metrics_see_the_steps_and_cannot_harm_them() -> None:
    class Broken(Numbers):
        def step(self, summary: StepSummary, running: int) -> None:
            super().step(summary, running)
            raise OSError("disk full")

    numbers = Broken()

    async def scenario() -> None:
        async with serving(slots=3, max_running=4, metrics=numbers) as host:
            programs = [host.program(1.0), host.program(2.0), None]
            await asyncio.gather(*(ask(host.engine, PROMPT, greedy(20), programs[i % 3]) for i in range(12)))
            assert max(numbers.running) == 4
            assert max(summary.programs for summary in numbers.summaries) == 2
            # Every position of the eight steered requests but the last, once.
            assert sum(summary.tokens for summary in numbers.summaries) == 8 * (len(PROMPT) + 19)

    asyncio.run(scenario())


def test_padding_belongs_to_nobody() -> None:
    laid_out: list[Sequence[Span]] = []

    class Recorder:
        def begin_step(self, spans: Sequence[Span]) -> None:
            laid_out.append(spans)

    steps = Steps(Recorder(), None, cancel=lambda _: None)
    steps.begin([Part("gone", start=7, length=2)], [5, 6, 0, 0, 0])
    assert laid_out == [[Span(None, 7, [5, 6]), Span(None, 0, [0, 0, 0])]]
