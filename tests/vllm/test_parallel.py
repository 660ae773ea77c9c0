"""One engine in several processes: whatever does the work, each choice comes back with its own block.

Tensor and pipeline parallelism on one SAE are paths of :mod:`tests.conformance`; here the sites lie in both stages.
"""

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import sae_steer
from sae_steer import embedded
from sae_steer.errors import CheckpointError
from sae_steer.tables import SiteTables
from tests.conformance.vllm_engine import register_interpreter
from tests.sae_files import write_saelens
from tests.steered_models import SteeredModel, embedded_model
from tests.vllm import inside
from tests.vllm.conftest import Servers, Setup, VllmServer, plugin_config
from tests.vllm.engine_script import OPTIONS, TWO_WORKERS, Answer, Ask, Json, answers_of, generate, hosted, plugin
from tests.vllm.teacher import Teacher, differences

SEA, TRAINS, SPACE, MUSIC = 551, 465, 234, 103
EARLY = "early"
"""Name of an SAE at the first layer: in a pipeline of two stages it is in the first, and the other in the second."""
LIMITS = {"max_programs": 8, "features": 8, "wide_programs": 1, "wide_features": 32}


@pytest.fixture(scope="module")
def model() -> SteeredModel:
    """The model that ships with the package."""
    return embedded_model()


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of random numbers at ``resid_post.0``."""
    folder = tmp_path_factory.mktemp("early")
    write_saelens(folder, d_in=192, n_features=64, hook_name="blocks.0.hook_resid_post")
    return folder


@pytest.fixture(scope="module")
def teacher(model: SteeredModel, early: Path) -> Iterator[Teacher]:
    """Knows what answers must be: one process with both SAEs."""
    with sae_steer.attach(model.model, {model.sae: model.sae_folder, EARLY: early}) as steer:
        yield Teacher(steer)


def _config(early: Path) -> Json:
    config = plugin(limits=LIMITS)
    return config | {"saes": [*config["saes"], {"name": EARLY, "location": str(early)}]}


def _edit(sae: str, feature: int, value: float, **more: object) -> Json:
    return {"sae": sae, "features": [feature], "op": "clamp", "value": value, **more}


def _mixed(model: SteeredModel) -> list[Ask]:
    """Requests with sites in the first stage, in the second, in both, and in none; one has two choices."""
    early, late = _edit(EARLY, 5, 30.0), _edit(embedded.SAE_NAME, TRAINS, 40.0)
    wanted: list[list[Json]] = [
        [early, late],
        [late],
        [early],
        [],
        [early | {"positions": "prompt"}, late | {"positions": "completion"}],
        [_edit(EARLY, 9, 20.0), _edit(embedded.SAE_NAME, SEA, 40.0), _edit(embedded.SAE_NAME, MUSIC, 20.0)],
    ]
    asked = [Ask(model.prompt, {"interventions": edits} if edits else None) for edits in wanted]
    two = {"n": 2, "temperature": 1.0, "seed": 1}
    return [*asked, Ask(model.prompt, {"interventions": [early, late]}, two), *asked[:2]]


def _right(teacher: Teacher, asked: list[Ask], answers: list[list[Answer]]) -> None:
    for number, (ask, choices) in enumerate(zip(asked, answers, strict=True)):
        assert choices
        for choice in choices:
            faults = teacher.faults(ask, choice, greedy=not ask.sampling)
            assert not faults, f"request {number}: {faults}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False},  # stock vLLM 0.32 dies on a CPU where it is not compiled
    ],
    ids=["another-process", "tensor", "pipeline"],
)
def test_sites_in_both_halves_give_one_block(
    tmp_path: Path, teacher: Teacher, model: SteeredModel, early: Path, options: dict[str, Any]
) -> None:
    environment = TWO_WORKERS | options.get("environment", {})
    engine = {key: value for key, value in options.items() if key != "environment"}
    asked = _mixed(model)
    with hosted(tmp_path, inside.start_llm, _config(early), engine, environment=environment) as host:
        answers = host.run(generate, asked)
    _right(teacher, asked, answers)
    assert answers[0][0].applied["sites"] == ["resid_post.0", "resid_post.3"]
    assert answers[0][0].tokens != answers[3][0].tokens


def _fail_to_load(worker: Any) -> None:
    """One rank cannot read what a request names; the other can."""
    if worker.rank == 1:

        def write(*_: object) -> None:
            raise CheckpointError("the disk of this rank is gone")

        SiteTables.write = write  # type: ignore[method-assign]


def half_failed(llm: Any, asked: list[Ask]) -> list[list[Answer]]:
    """Answers requests once one of two ranks cannot load anything."""
    llm.collective_rpc(_fail_to_load)
    return generate(llm, asked)


@pytest.mark.slow
def test_what_one_rank_cannot_load_is_steered_by_none(tmp_path: Path, model: SteeredModel, early: Path) -> None:
    steered = Ask(model.prompt, {"interventions": [_edit(embedded.SAE_NAME, TRAINS, 40.0)]})
    plain = Ask(model.prompt, None)
    options = {"tensor_parallel_size": 2}
    with hosted(tmp_path, inside.start_llm, _config(early), options, environment=TWO_WORKERS) as host:
        [[before]] = host.run(generate, [plain])
        [[failed], [after]] = host.run(half_failed, [steered, plain])
    assert failed.block is not None
    assert failed.block["error"]["code"] == "request_failed"
    assert "Another process" in failed.block["error"]["message"]
    assert after.tokens == before.tokens


def start_v2(config: Json, options: Json) -> Any:
    """Starts ``LLM`` with V2's model runner and asynchronous scheduling."""
    register_interpreter()
    return inside.start_async(config, options)


@pytest.mark.slow
def test_the_second_runner_schedules_ahead(
    tmp_path: Path, teacher: Teacher, model: SteeredModel, early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the process imports triton
    asked = [Ask(each.prompt, each.steering, {"ignore_eos": True, "max_tokens": 70}) for each in _mixed(model)[:6]]
    options = {"num_gpu_blocks_override": 13, "max_num_batched_tokens": 64}
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    with hosted(tmp_path, start_v2, _config(early), options, environment=environment) as host:
        seen = host.run(inside.stepped, asked)
    assert any(asked[number].steering and any(at) for number, at in seen.preempted.items())
    for ask, [answer] in zip(asked, seen.answers, strict=True):
        assert not (faults := teacher.faults(ask, answer)), faults


async def start_replicas(config: Json, options: Json) -> Any:
    """Starts ``AsyncLLM``."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = OPTIONS | {"additional_config": {"sae_steer": config}} | options
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def stream(engine: Any, asked: list[Ask], ranks: int) -> list[list[Answer]]:
    """Answers requests as streams, in turn by each engine of data parallelism."""

    async def one(number: int, ask: Ask) -> list[Answer]:
        last = None
        async for output in engine.generate(
            {"prompt_token_ids": list(ask.prompt)}, ask.params(), f"r{number}", data_parallel_rank=number % ranks
        ):
            last = output
        return answers_of(last)

    return list(await asyncio.gather(*(one(number, ask) for number, ask in enumerate(asked))))


@pytest.mark.slow
def test_each_engine_of_data_parallelism_steers(
    tmp_path: Path, teacher: Teacher, model: SteeredModel, early: Path
) -> None:
    asked = _mixed(model)
    two = {"data_parallel_size": 2}
    with hosted(tmp_path, start_replicas, _config(early), two, environment=TWO_WORKERS) as host:
        for turn in (asked, asked[1:] + asked[:1]):  # each request is answered by each engine
            _right(teacher, turn, host.run(stream, turn, 2))


def _complete(server: VllmServer, ask: Ask) -> tuple[list[int], Json]:
    """Answers over a connection of its own."""
    body = {"model": "demo", "prompt": list(ask.prompt), "temperature": 0, "max_tokens": 16, "return_token_ids": True}
    steering = {"steering": ask.steering} if ask.steering else {}
    reply = httpx.post(f"{server.base_url}/completions", json=body | steering, timeout=120).raise_for_status().json()
    return reply["choices"][0]["token_ids"], reply["choices"][0].get("steering")


@pytest.mark.parametrize(
    "arguments", [(), pytest.param(("--data-parallel-size", "2"), marks=pytest.mark.slow)], ids=["one-engine", "two"]
)
def test_two_api_servers_return_their_blocks(
    vllm_servers: Servers, teacher: Teacher, model: SteeredModel, arguments: tuple[str, ...]
) -> None:
    features = (TRAINS, SEA, SPACE, MUSIC)
    edits = [_edit(embedded.SAE_NAME, feature, 40.0) for feature in features]
    read = {"sae": embedded.SAE_NAME, "features": [SEA, TRAINS], "positions": "all"}
    asked = [Ask(model.prompt, {"interventions": [edit], "readings": read}) for edit in edits] + [Ask(model.prompt)]
    asked = asked * 4
    arguments = ("--api-server-count", "2", "--enable-log-requests", *arguments)
    setup = Setup(plugin_config(), arguments=arguments, environment=dict(TWO_WORKERS))
    replies: list[tuple[Ask, tuple[list[int], Json]]] = []
    answered: set[str] = set()
    with vllm_servers.serve(setup) as server, ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(20):  # whichever wakes first takes a connection, and that may be one of them for a while
            replies += zip(asked, pool.map(lambda ask: _complete(server, ask), asked), strict=True)
            answered = set(re.findall(r"\(ApiServer_(\d) pid=\d+\).*Received request cmpl-", server.log))
            if answered == {"0", "1"}:
                break
    assert answered == {"0", "1"}, "one of the two answered all requests"
    for ask, (tokens, block) in replies:
        logprobs, applied = teacher.expect(ask.prompt, ask.steering, tokens)
        here = logprobs[len(ask.prompt) - 1 :]
        assert float((here.max(dim=1).values - here.gather(1, torch.tensor(tokens)[:, None])[:, 0]).max()) < 1e-3
        assert (block is None) == (ask.steering is None)
        if block is not None:
            reads = [{key: value for key, value in one.items() if key != "text"} for one in block["readings"]]
            assert not differences("readings", reads, applied.pop("readings"))
            assert not applied.pop("triggers")
        assert not differences("applied", block and block["applied"], applied)
