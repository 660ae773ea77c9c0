"""What the server answers through the official client: against generate, against itself alone, and the definition."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI

from sae_steer.limits import Limits
from sae_steer_server.settings import SaeSource, Settings
from tests.server.conftest import Served
from tests.steered_models import SteeredModel, embedded_model, story_model

TOKENS = 32
Request = dict[str, Any] | None


@pytest.fixture(scope="module", params=["embedded", pytest.param("stories", marks=pytest.mark.assets)])
def steered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    """The embedded model, and a published one."""
    if request.param == "embedded":
        return embedded_model()
    return story_model(request.getfixturevalue("assets"), tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def server(steered: SteeredModel) -> Iterator[Served]:
    """A server of that model, in float32."""
    served = Served(
        Settings(
            model=str(steered.folder),
            saes=(SaeSource(steered.sae, str(steered.sae_folder)),),
            whole=frozenset([steered.sae]),
            served_names=("m",),
            dtype="float32",
            device="cpu",
            port=0,
            limits=Limits(max_programs=32),
            max_running=32,
            max_concurrent=64,
        )
    )
    yield served
    served.stop()


def requests_of(steered: SteeredModel) -> dict[str, Request]:
    """A plain request, and edits that change the answer; that they do is asserted where they are used."""
    first, second, *_ = steered.firing
    return {
        "plain": None,
        "clamp": steered.clamp(first, 1.0),
        "ablate": {"interventions": [steered.edit(steered.firing[:8], "ablate")]},
        "gated": {
            "interventions": [
                steered.edit([first], "add", value=1.0, units="residual_norm", when={
                    "sae": steered.sae, "feature": second, "below": 1e3,
                }, positions="completion"),
            ],
            "dose": {"limit": 1.5, "on_dose": "scale"},
        },
        "drop": {"interventions": [steered.edit(steered.firing[:4], "scale", value=2.0)], "error": "drop"},
    }  # fmt: skip


async def answer(client: AsyncOpenAI, steered: SteeredModel, request: Request, tokens: int = TOKENS) -> Any:
    return await client.completions.create(
        model="m",
        prompt=steered.prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"steering": request} if request else None,
    )


def client_of(server: Served) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def test_unsteered_equals_generate(steered: SteeredModel, server: Served) -> None:
    prompt = torch.tensor([steered.prompt])
    out = steered.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=TOKENS)

    async def run() -> Any:
        async with client_of(server) as client:
            return await answer(client, steered, None)

    reply = asyncio.run(run())
    assert reply.choices[0].text == steered.text(out[0, len(steered.prompt) :].tolist())
    assert "steering" not in reply.model_dump(exclude_unset=True)


def test_together_equals_alone_equals_the_definition(steered: SteeredModel, server: Served) -> None:
    requests = requests_of(steered)

    async def run() -> tuple[list[Any], list[Any]]:
        async with client_of(server) as client:
            together = await asyncio.gather(*(answer(client, steered, request) for request in requests.values()))
            return list(together), [await answer(client, steered, request) for request in requests.values()]

    together, alone = asyncio.run(run())
    plain = together[0].choices[0].text
    for (name, request), a, b in zip(requests.items(), together, alone, strict=True):
        expected = steered.expected(request, TOKENS)
        assert a.choices[0].text == b.choices[0].text == steered.text(expected), name
        assert a.usage.completion_tokens == len(expected), name
        if request is not None:
            assert a.choices[0].text != plain, f"{name} changes nothing, so it shows nothing"
            assert a.choices[0].steering["applied"]["fired"] > 0, name
            assert a.steering["program"].startswith("sha256:")


def many_programs(steered: SteeredModel, count: int) -> list[dict[str, Any]]:
    """Different programs of all kinds of edits."""
    firing = steered.firing
    programs = []
    for i in range(count):
        a, b = firing[i % 16], firing[(i * 7 + 3) % 24]
        programs.append(
            [
                steered.clamp(a, 0.5 + i / 40),
                {"interventions": [steered.edit([a], "ablate"), steered.edit([31 + i], "add", value=1.0 + i)]},
                {"interventions": [steered.edit([a], "scale", value=1.5 + i / 10, positions="completion")]},
                {"interventions": [steered.edit([a], "floor", value=0.02 * (i + 1), units="residual_norm")]},
                {"interventions": [steered.edit([b], "add", value=3.0 + i, positions={"ranges": [[i, i + 12]]})]},
            ][i % 5]
        )
    return programs


def metric(server: Served, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name) and not line.startswith("#"))


def test_two_hundred_requests_of_fifty_programs(steered: SteeredModel, server: Served) -> None:
    programs = many_programs(steered, 50)

    async def run() -> tuple[list[Any], list[Any]]:
        gate = asyncio.Semaphore(32)
        async with client_of(server) as client:
            alone = [await answer(client, steered, program, 24) for program in programs]

            async def one(number: int) -> Any:
                async with gate:
                    return await answer(client, steered, programs[number % 50], 24)

            return alone, list(await asyncio.gather(*(one(number) for number in range(200))))

    alone, crowd = asyncio.run(run())
    digests = {reply.steering["program"] for reply in alone}
    assert len(digests) == 50
    assert len(crowd) == 200
    for number, reply in enumerate(crowd):
        expected = alone[number % 50]
        assert reply.steering["program"] == expected.steering["program"]
        assert reply.choices[0].text == expected.choices[0].text, programs[number % 50]
    assert len({reply.choices[0].text for reply in alone}) >= 10, "the programs hardly differ in what they do"
    assert metric(server, "sae_steer_programs_per_step_max") >= 16
    assert metric(server, "sae_steer_slots_in_use") == 0
