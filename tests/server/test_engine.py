"""What a request gets: its own completion, whatever runs beside it."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import RequestState

from sae_steer.errors import LimitExceeded, RequestError, StartError
from tests.server.engine_host import (
    EOS,
    VOCABULARY,
    Answer,
    Host,
    ask,
    ask_all,
    greedy,
    prompts,
    sampled,
    serving,
    tiny_model,
    tiny_tokenizer,
)


@torch.no_grad()
def generated(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    whole = model.generate(
        ids, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    return [int(token) for token in whole[0, len(prompt) :]]


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """``[n, V]`` log-probabilities of the model before each completion token."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def test_greedy_is_what_generate_gives() -> None:
    model, asked = tiny_model(), prompts(24)
    expected = [generated(model, prompt, 12 + i) for i, prompt in enumerate(asked)]

    async def scenario() -> None:
        async with serving(model) as host:
            # 24 prompts are more than one step's tokens: prefills are split.
            assert sum(map(len, asked)) > 2 * 512
            answers = await ask_all(host.engine, [(p, greedy(12 + i)) for i, p in enumerate(asked)])
            assert [answer.tokens for answer in answers] == expected
            for answer, tokens in zip(answers, expected, strict=True):
                assert answer.reason == ("stop" if tokens[-1] in EOS else "length")
            quiet = await ask(host.engine, asked[0], greedy(12, logprobs=None))
            assert quiet.text == answers[0].text
            assert quiet.logprobs == []

    asyncio.run(scenario())


def test_sliding_windows() -> None:
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.25,
        eos_token_id=257,
    )
    model, asked = Gemma3ForCausalLM(config).eval(), prompts(8, 60)
    expected = [generated(model, prompt, 30) for prompt in asked]

    async def scenario() -> None:
        async with serving(model) as host:
            answers = await ask_all(host.engine, [(prompt, greedy(30)) for prompt in asked])
            assert [answer.tokens for answer in answers] == expected

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["stories260k", "babyllama-char361"])
def test_real_models(assets: Path, name: str) -> None:
    folder = assets / "models" / name
    golden = json.loads((folder / "golden.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    async def scenario() -> None:
        async with serving(model, tokenizer) as host:
            answers = await ask_all(
                host.engine, [(case["prompt_ids"], greedy(len(case["greedy_ids"]))) for case in golden]
            )
        for case, answer in zip(golden, answers, strict=True):
            assert answer.tokens == case["greedy_ids"]
            assert case["prompt"] + answer.text == case["greedy_text"]

    asyncio.run(scenario())


def mixture(host: Host) -> list[tuple[Any, ...]]:
    """24 requests: greedy and sampled, plain and steered by five programs, of many lengths."""
    programs = [
        None,
        host.program(2.0),
        host.program(-3.0),
        None,
        host.program(5.0),
        host.program(1.0),
        host.program(4.0),
    ]
    return [
        (prompt, sampled(10 + i, seed=i % 5) if i % 2 else greedy(10 + i), programs[i % 7])
        for i, prompt in enumerate(prompts(24, 60))
    ]


def counts(answer: Answer) -> tuple[int, int] | None:
    block = answer.chunks[-1].steering
    return (block["applied"]["tokens"], block["applied"]["fired"]) if block is not None else None


def test_neighbours_change_nothing() -> None:
    async def scenario() -> None:
        async with serving(slots=3) as host:
            asked = mixture(host)
            alone = [await ask(host.engine, *each) for each in asked]
            together = await ask_all(host.engine, asked)
            backwards = await ask_all(host.engine, asked[::-1])
            for one, two, three in zip(alone, together, backwards[::-1], strict=True):
                assert one.tokens == two.tokens == three.tokens
                assert one.text == two.text
                assert counts(one) == counts(two) == counts(three)
            await host.settled()

    asyncio.run(scenario())


def test_seeds() -> None:
    async def scenario() -> None:
        async with serving() as host:
            prompt = prompts(1)[0]
            first, again, other = [await ask(host.engine, prompt, sampled(30, seed)) for seed in (1, 1, 2)]
            assert first.tokens == again.tokens != other.tokens
            # A completion goes on as it would have: position decides, not how many numbers were drawn.
            rest = await ask(host.engine, prompt + first.tokens[:10], sampled(20, 1))
            assert rest.tokens == first.tokens[10:]

    asyncio.run(scenario())


def test_a_full_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[str] = []
    reset = RequestState.create_equivalent_initial_request

    def counting(state: RequestState) -> RequestState:
        resets.append(state.request_id)
        return reset(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counting)

    async def scenario() -> None:
        async with serving(max_model_len=96, kv_tokens=160) as host:
            program = host.program(3.0, positions="completion")
            asked = [(p, sampled(60, seed=i), program if i % 2 else None) for i, p in enumerate(prompts(8, 30))]
            alone = [await ask(host.engine, *each) for each in asked]
            assert not resets
            together = await ask_all(host.engine, asked)
            assert [a.tokens for a in together] == [a.tokens for a in alone]
            assert len(set(resets)) > 2
            for i, (prompt, _, steered) in enumerate(asked):
                if steered is not None:
                    block = together[i].chunks[-1].steering
                    assert block is not None
                    # The last prompt token and all completion tokens but the last are computed: nothing twice.
                    assert block["applied"]["tokens"] == len(together[i].tokens), len(prompt)

    asyncio.run(scenario())


def test_logprobs_are_the_models_own() -> None:
    async def scenario() -> None:
        async with serving() as host:
            prompt = prompts(3)[2]
            for asked in (greedy(8, logprobs=5), sampled(8, 3, logprobs=5, temperature=0.5)):
                answer = await ask(host.engine, prompt, asked)
                expected = teacher_forced(host.model, prompt, answer.tokens)
                for entry, row in zip(answer.logprobs, expected, strict=True):
                    assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
                    values, ids = row.topk(5)
                    assert [token for token, _, _ in entry.top] == ids.tolist()
                    assert [value for _, _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)

    asyncio.run(scenario())


def test_end_of_sequence() -> None:
    prompt = prompts(5)[4]
    tokens = generated(tiny_model(), prompt, 20)
    ends = next(i for i, token in enumerate(tokens) if i >= 5 and token not in tokens[:i])
    model = tiny_model(eos=(299, tokens[ends]))

    async def scenario() -> None:
        async with serving(model) as host:
            answer = await ask(host.engine, prompt, greedy(20))
            assert answer.reason == "stop"
            assert answer.tokens == tokens[: ends + 1]
            before = await ask(host.engine, prompt, greedy(ends))
            assert before.reason == "length"
            assert before.text == answer.text
            beyond = await ask(host.engine, prompt, greedy(20, ignore_eos=True))
            assert (beyond.tokens, beyond.reason) == (tokens, "length")

    asyncio.run(scenario())


def test_stop_texts_end_the_request_at_once(assets: Path) -> None:
    folder = assets / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode("Once upon a time")

    async def scenario() -> None:
        async with serving(model, tokenizer) as host:
            program = host.program(0.01)
            whole = await ask(host.engine, prompt, greedy(60), program)
            for stop in ("girl named", "il", "zzz", "play outside in the park. One"):
                answer = await ask(host.engine, prompt, greedy(60, stop=(stop, "never said")), program)
                if stop not in whole.text:
                    assert (answer.text, answer.reason) == (whole.text, "length")
                    continue
                assert (answer.text, answer.reason) == (whole.text[: whole.text.index(stop)], "stop")
                count = len(answer.tokens)
                assert stop in tokenizer.decode(whole.tokens[:count])
                # No forward pass ran for it beyond the one that completed the stop text.
                block = answer.chunks[-1].steering
                assert block is not None
                assert block["applied"]["tokens"] == len(prompt) + count - 1
            await host.settled()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "changes", "refusal"),
    [
        ([], {}, RequestError),
        ([0, 300], {}, RequestError),
        ([0, -1], {}, RequestError),
        ([0] * 250, {"max_tokens": 7}, LimitExceeded),
        ([0], {"max_tokens": 0}, RequestError),
        ([0], {"stop": ("",)}, RequestError),
    ],
)
def test_refusals_come_before_anything_runs(prompt: list[int], changes: Any, refusal: type[RequestError]) -> None:
    async def scenario() -> None:
        async with serving() as host:
            with pytest.raises(refusal):
                host.engine.generate(prompt, None, greedy(**({"max_tokens": 6} | changes)))
            longest = await ask(host.engine, [0] * 250, greedy(6))
            assert longest.chunks

    asyncio.run(scenario())


@pytest.mark.parametrize("kv_tokens", [64, 10**12])
def test_a_cache_of_the_wrong_size_refuses_the_start(kv_tokens: int) -> None:
    async def scenario() -> None:
        with pytest.raises(StartError, match="key-value cache"):
            async with serving(kv_tokens=kv_tokens, tokenizer=tiny_tokenizer()):
                pass

    asyncio.run(scenario())
