"""How the engine ends: on request, or because its thread died. Nobody is left waiting."""

import asyncio
import threading
from typing import Any

import pytest

from sae_steer.errors import EngineDown
from tests.server.engine_host import Answer, Host, ask, greedy, serving

PROMPT = [256, 70, 71, 72, 73]


async def everybody(host: Host) -> list[Answer | BaseException]:
    """Four that run, two of them steered, and two that wait for a slot."""
    programs = [None, None, *(host.program(value) for value in (1.0, 2.0, 3.0, 4.0))]
    return await asyncio.gather(
        *(ask(host.engine, PROMPT, greedy(200), program) for program in programs), return_exceptions=True
    )


def all_down(answers: list[Answer | BaseException]) -> bool:
    return [type(answer) for answer in answers] == [EngineDown] * len(answers)


def break_model(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(**_: Any) -> None:
        raise ZeroDivisionError("the device is gone")

    monkeypatch.setattr(host.model, "forward", forward)


async def check_dead(host: Host) -> None:
    for thread in threading.enumerate():
        if thread.name == "sae-steer-watch":
            await asyncio.to_thread(thread.join)
    assert not host.engine.alive
    with pytest.raises(EngineDown):
        await ask(host.engine, PROMPT, greedy(5))
    await host.settled()


def test_an_engine_that_dies_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(slots=2) as host:
            waiting = asyncio.create_task(everybody(host))
            await ask(host.engine, PROMPT, greedy(3))
            assert host.engine.alive
            break_model(host, monkeypatch)
            assert all_down(await waiting)
            await check_dead(host)

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that is what is tested
def test_a_thread_that_dies_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(slots=2) as host:
            waiting = asyncio.create_task(everybody(host))
            await ask(host.engine, PROMPT, greedy(3))

            def silent(*_: Any) -> None:
                raise ZeroDivisionError("not a word")

            monkeypatch.setattr(host.engine._batch._manager, "_fail_all_remaining_requests", silent)
            break_model(host, monkeypatch)
            assert all_down(await waiting)
            await check_dead(host)

    asyncio.run(scenario())


def test_stop_lets_finish_what_runs() -> None:
    async def scenario() -> None:
        async with serving() as host:
            program = host.program(2.0)
            running = [asyncio.create_task(ask(host.engine, PROMPT, greedy(100), each)) for each in (None, program)]
            await asyncio.sleep(0)
            await host.engine.stop(grace=200)
            for answer in await asyncio.gather(*running):
                assert answer.reason is not None
            with pytest.raises(EngineDown, match="shutting down"):
                host.engine.generate(PROMPT, None, greedy(5))
            await host.settled()

    asyncio.run(scenario())


def test_stop_without_grace_tells_everybody() -> None:
    async def scenario() -> None:
        async with serving(slots=2) as host:
            waiting = asyncio.create_task(everybody(host))
            await ask(host.engine, PROMPT, greedy(3))
            await host.engine.stop(grace=0)
            assert all_down(await waiting)
            await host.engine.stop(grace=0)
            await check_dead(host)

    asyncio.run(scenario())


def test_stop_leaves_the_model_as_it_was() -> None:
    async def scenario() -> tuple[Host, str | None]:
        async with serving() as host:
            attention = host.model.config._attn_implementation
            await ask(host.engine, PROMPT, greedy(3))
        return host, attention

    host, attention = asyncio.run(scenario())
    assert not host.model._forward_hooks
    assert not host.model._forward_pre_hooks
    assert host.model.config._attn_implementation == attention
    assert [thread.name for thread in threading.enumerate() if "watch" in thread.name] == []


def test_an_engine_that_was_not_started_says_so() -> None:
    async def scenario() -> None:
        async with serving() as host:
            await host.engine.stop(grace=0)
            fresh = type(host.engine)(host.model, host.engine._tokenizer, host.runtime, max_running=2, max_model_len=64)
            assert not fresh.alive
            with pytest.raises(EngineDown, match="not started"):
                fresh.generate(PROMPT, None, greedy(5))
            await fresh.stop(grace=1)

    asyncio.run(scenario())
