"""A cache that was full must not keep later requests waiting, however those that filled it ended."""

import asyncio

import pytest
from transformers.generation.continuous_batching.requests import RequestState

from sae_steer.errors import DoseExceeded, RunFailed
from sae_steer.program import Program
from sae_steer.slots import Slot
from sae_steer_server.engine.admission import Admission
from tests.server.engine_host import ask, greedy, prompts, sampled, serving

SECONDS = 60  # a bound against hanging, not a speed


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the requests that lost their cache."""
    seen: list[str] = []
    reset = RequestState.create_equivalent_initial_request

    def counting(state: RequestState) -> RequestState:
        seen.append(state.request_id)
        return reset(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counting)
    return seen


def test_when_all_clients_hang_up(resets: list[str]) -> None:
    async def scenario() -> None:
        async with serving(max_model_len=96, kv_tokens=160) as host:
            program = host.program(3.0)
            asked = [(p, sampled(60, i), program if i % 2 else None) for i, p in enumerate(prompts(8, 30))]
            tasks = [asyncio.create_task(ask(host.engine, *each)) for each in asked]
            while not resets:
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            answer = await asyncio.wait_for(ask(host.engine, prompts(1)[0], greedy(3)), SECONDS)
            assert len(answer.tokens) == 3
            await asyncio.wait_for(host.settled(), SECONDS)

    asyncio.run(scenario())


def test_when_all_requests_pass_their_dose(resets: list[str]) -> None:
    async def scenario() -> None:
        async with serving(max_model_len=96, kv_tokens=160) as host:
            late = {"ranges": [[60, 96]]}
            program = host.program(50.0, positions=late, dose={"limit": 0.01, "on_dose": "fail"})
            asked = [(p, sampled(60, i), program) for i, p in enumerate(prompts(8, 30))]
            tasks = [asyncio.create_task(ask(host.engine, *each)) for each in asked]
            ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SECONDS)
            assert all(isinstance(end, DoseExceeded) or not isinstance(end, BaseException) for end in ended)
            assert any(isinstance(end, DoseExceeded) for end in ended)
            assert resets
            answer = await asyncio.wait_for(ask(host.engine, prompts(1)[0], greedy(3)), SECONDS)
            assert len(answer.tokens) == 3
            await asyncio.wait_for(host.settled(), SECONDS)

    asyncio.run(scenario())


class _Slots:
    """A runtime whose memory is too small for one program."""

    slots_in_use = 0

    def __init__(self, bad: Program) -> None:
        self._bad = bad

    def acquire(self, program: Program) -> Slot:
        if program is self._bad:
            raise MemoryError
        return Slot(0, 1)

    def release(self, program: Program) -> None:
        pass


def test_a_program_that_does_not_load_holds_up_nobody() -> None:
    async def scenario() -> None:
        async with serving() as host:
            bad, good = host.program(1.0), host.program(2.0)
            admission = Admission(_Slots(bad), None)  # type: ignore[arg-type]  # what it needs of a runtime
            with pytest.raises(RunFailed, match="MemoryError"):
                await admission.acquire(bad)
            assert await asyncio.wait_for(admission.acquire(good), SECONDS) == Slot(0, 1)

    asyncio.run(scenario())
