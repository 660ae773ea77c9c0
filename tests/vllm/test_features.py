"""Steering beside vLLM's other features, offline: each answer is judged by ``sae_steer.attach``, token by token."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import sae_steer
from sae_steer import embedded
from tests.steered_models import SteeredModel, embedded_model
from tests.tekken import write_tekken
from tests.vllm import inside
from tests.vllm.engine_script import Answer, Ask, EngineFailed, Host, Json, generate, hosted, plugin
from tests.vllm.teacher import Teacher, differences

SEA, TRAINS, SPACE, MUSIC, SCHOOL = 551, 465, 234, 103, 621
LIMITS = {"max_programs": 3, "features": 8, "wide_programs": 1, "wide_features": 32}
STEP = 64
"""Most tokens of a step: longer prompts come in chunks."""
# Twelve blocks for requests: two of the longest requests fill them.
TIGHT = {
    "num_gpu_blocks_override": 13, "max_num_batched_tokens": STEP,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}  # fmt: skip
LONG = {"ignore_eos": True, "max_tokens": 90}
TALK = (
    "Tell me about the sea.",
    "I dreamed about the sea. I saw a castle made of sand. The tide came in and the shells slowly went away. "
    "I saw a sailor with a long beard. The waves were high that day. The boat sailed home in the evening.",
    "Tell me about trains.",
)


@pytest.fixture(scope="module")
def model() -> SteeredModel:
    """The model that ships with the package."""
    return embedded_model()


@pytest.fixture(scope="module")
def teacher(model: SteeredModel) -> Iterator[Teacher]:
    """Knows what answers must be."""
    with sae_steer.attach(model.model, {model.sae: model.sae_folder}, whole=[model.sae]) as steer:
        yield Teacher(steer)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the engine's profile ``changing``."""
    file = tmp_path_factory.mktemp("profiles") / "changing" / "profile.json"
    file.parent.mkdir()
    file.write_text(_profile(TRAINS))
    return file


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, profile: Path) -> Iterator[Host]:
    """An engine whose cache holds two long requests, with events of its cache and a logits processor."""
    config = plugin(limits=LIMITS, profiles=str(profile.parents[1]))
    options = TIGHT | {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}
    with hosted(tmp_path_factory.mktemp("engine"), inside.start_with_processor, config, options) as host:
        yield host


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The same with asynchronous scheduling, priorities and LoRA."""
    # One place for an adapter more than there are: vLLM's kernels for a CPU give rows without one that of the last.
    options = TIGHT | {"scheduling_policy": "priority", "enable_lora": True, "max_lora_rank": 8, "max_loras": 3}
    with hosted(tmp_path_factory.mktemp("ahead"), inside.start_async, plugin(limits=LIMITS), options) as host:
        yield host


@pytest.fixture(params=["engine", "ahead"])
def either(request: pytest.FixtureRequest) -> Host:
    """Each of the two engines."""
    host: Host = request.getfixturevalue(request.param)
    return host


def _profile(feature: int) -> str:
    stored = json.loads((embedded.PROFILES / "grumpy" / "profile.json").read_text())
    stored["interventions"] = [{"sae": embedded.SAE_NAME, "features": [feature], "op": "clamp", "value": 40.0}]
    return json.dumps(stored | {"name": "changing"})


def _clamp(feature: int, **more: object) -> Json:
    return {"interventions": [{"sae": embedded.SAE_NAME, "features": [feature], "op": "clamp", "value": 40.0, **more}]}


def _chat(model: SteeredModel, *texts: str) -> list[int]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    chat = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return [int(token) for token in chat["input_ids"]]


def _right(teacher: Teacher, asked: list[Ask], answers: list[list[Answer]], **how: bool) -> None:
    """Each choice is what its own request asks; ``how`` it was made is what :meth:`Teacher.faults` takes."""
    for number, (ask, choices) in enumerate(zip(asked, answers, strict=True)):
        assert choices
        for choice in choices:
            assert not (faults := teacher.faults(ask, choice, **how)), f"request {number}: {faults}"
            assert choice.applied is None or choice.applied["fired"] > 0


def test_a_preempted_request_is_answered_as_if_it_had_never_been(
    either: Host, teacher: Teacher, model: SteeredModel
) -> None:
    features = (TRAINS, None, SEA, MUSIC, None, TRAINS)
    asked = [Ask(model.prompt, _clamp(f) if f else None, LONG) for f in features]
    seen = either.run(inside.stepped, asked)
    assert any(asked[number].steering and any(at) for number, at in seen.preempted.items()), seen.preempted
    _right(teacher, asked, seen.answers)
    for ask, [answer] in zip(asked, seen.answers, strict=True):
        if ask.steering:  # a token that is computed twice counts once
            assert answer.applied["tokens"] == len(ask.prompt) + 90 - 1
    assert seen.slots[-1] == 0


def test_priorities_decide_who_is_preempted(ahead: Host, teacher: Teacher, model: SteeredModel) -> None:
    asked = [Ask(model.prompt, _clamp(f), LONG, priority=p) for f, p in ((TRAINS, 5), (SEA, 9), (MUSIC, 0), (SEA, 1))]
    seen = ahead.run(inside.stepped, asked)
    assert set(seen.preempted) == {1}, seen.preempted
    _right(teacher, asked, seen.answers)


@pytest.mark.parametrize("every", [2, 5])
def test_a_cache_that_is_emptied_under_running_requests_changes_nothing_that_is_told(
    either: Host, teacher: Teacher, model: SteeredModel, every: int
) -> None:
    """With asynchronous scheduling the token of the step that runs then is thrown away and drawn anew."""
    read = {"sae": embedded.SAE_NAME, "features": [SEA, TRAINS], "top_k": 3, "positions": "all"}
    flag = {"sae": embedded.SAE_NAME, "feature": SEA, "above": 0.0, "action": "flag"}
    asks: list[Json] = [
        {"readings": read, "on": [flag]},
        _clamp(TRAINS) | {"readings": [read | {"at": "after"}, read | {"positions": "completion"}]},
    ]
    sampling = {"ignore_eos": True, "max_tokens": 14, "temperature": 1.0}
    asked = [Ask(model.prompt, steering, sampling) for steering in asks for _ in range(2)]
    seen = either.run(inside.emptied, asked, every)
    assert len(seen.preempted) == len(asked)
    assert all(len(at) > 1 for at in seen.preempted.values())
    for ask, [answer] in zip(asked, seen.answers, strict=True):
        _, want = teacher.expect(ask.prompt, ask.steering, answer.tokens)
        told = [{key: value for key, value in one.items() if key != "text"} for one in answer.block["readings"]]
        have = {**answer.block["applied"], "readings": told, "triggers": answer.block["triggers"]}
        assert told[0]["tokens"] == [*ask.prompt, *answer.tokens[:-1]]
        assert not differences("block", have, want)
        assert not teacher.faults(ask, answer, greedy=False, cached=True)


@pytest.mark.parametrize("positions", ["prompt", "completion", "all"])
def test_a_prompt_in_chunks_has_the_same_phases(
    either: Host, teacher: Teacher, model: SteeredModel, positions: str
) -> None:
    prompt = _chat(model, *TALK)
    assert len(prompt) > STEP
    sampling = {"max_tokens": 12}
    asked = [Ask(prompt, _clamp(SPACE, positions=positions), sampling), Ask(prompt[:-9], None, sampling)]
    answers = either.run(generate, asked)
    _right(teacher, asked, answers)
    tokens = {"prompt": len(prompt) - 1, "completion": 12, "all": len(prompt) + 11}
    assert answers[0][0].applied["tokens"] == tokens[positions]
    assert answers[0][0].tokens != either.run(generate, [Ask(prompt, None, sampling)])[0][0].tokens


def test_an_abort_gives_the_slot_to_who_waits(either: Host, teacher: Teacher, model: SteeredModel) -> None:
    sampling = {"ignore_eos": True, "max_tokens": 40}
    held = [Ask(model.prompt, _clamp(f), sampling) for f in (TRAINS, SEA, MUSIC)]
    held[0] = Ask(model.prompt, _clamp(TRAINS), sampling | {"n": 2, "temperature": 1.0, "seed": 1})
    parked = [Ask(model.prompt, _clamp(f), sampling) for f in (SPACE, SCHOOL)]
    asked = [*held, *parked, Ask(model.prompt, None, sampling)]
    later = [Ask(model.prompt, _clamp(SPACE), sampling)]
    seen = either.run(inside.aborted, asked, [0, 3], later)
    assert seen.waiting[5] == 2, "two of the five programs wait for one of three slots"
    assert seen.waiting[6] == 0, "one is gone, and the other has the slot of the request that is gone"
    assert max(seen.slots) == 3
    assert seen.slots[-1] == 0
    assert not seen.answers[0]
    assert not seen.answers[3]
    kept = [1, 2, 4, 5, 6]
    _right(teacher, [[*asked, *later][i] for i in kept], [seen.answers[i] for i in kept])


def test_each_choice_has_its_own_block(either: Host, teacher: Teacher, model: SteeredModel) -> None:
    sampling = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    asked = [Ask(model.prompt, _clamp(TRAINS), sampling), Ask(model.prompt, None, sampling)]
    answers = either.run(generate, asked)
    assert [len(choices) for choices in answers] == [3, 3]
    assert len({str(choice.block) for choice in answers[0]}) > 1
    _right(teacher, asked, answers, greedy=False)


def test_seeded_samples_are_the_same_alone_and_in_a_batch(engine: Host, teacher: Teacher, model: SteeredModel) -> None:
    samplings: list[Json] = [
        {"temperature": 1.0, "min_p": 0.05, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 4},
        {"temperature": 1.0, "seed": 5, "min_tokens": 16, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ]
    # In one step: vLLM 0.32 dies on a CPU where the prompt of a seeded request comes in chunks, steered or not.
    asked = [Ask(model.prompt, _clamp(TRAINS) if steered else None, s) for s in samplings for steered in (True, False)]
    together = engine.run(generate, asked)
    alone = [engine.run(generate, [ask])[0] for ask in asked]
    assert [[c.tokens for c in choices] for choices in together] == [[c.tokens for c in choices] for choices in alone]
    assert len({str(choices[0].tokens) for choices in together}) == len(asked)
    _right(teacher, asked, together, greedy=False)


def test_processors_of_logits_see_what_steering_made(engine: Host, teacher: Teacher, model: SteeredModel) -> None:
    [[first]] = engine.run(generate, [Ask(model.prompt, _clamp(SEA))])
    banned = first.tokens[0]
    samplings: list[Json] = [{"logit_bias": {banned: -100.0}}, {"extra_args": {"ban": banned}}]
    asked = [Ask(model.prompt, _clamp(SEA), sampling) for sampling in samplings]
    answers = engine.run(generate, asked)
    _right(teacher, asked, answers, greedy=False)
    likeliest, _ = teacher.expect(model.prompt, _clamp(SEA), [0])
    for [answer] in answers:
        assert banned not in answer.tokens
        assert answer.tokens[0] == int(likeliest[-1].topk(2).indices[1])


def test_logprobs_of_a_steered_prompt(engine: Host, teacher: Teacher, model: SteeredModel) -> None:
    prompt = _chat(model, *TALK)
    sampling = {"prompt_logprobs": 0, "max_tokens": 4}
    asked = [Ask(prompt, _clamp(SPACE), sampling), Ask(prompt, None, sampling), Ask(prompt, _clamp(SEA), sampling)]
    answers = engine.run(generate, asked)
    _right(teacher, asked, answers)
    for ask, [answer] in zip(asked, answers, strict=True):
        want = torch.tensor(teacher.prompt_logprobs(ask))
        torch.testing.assert_close(torch.tensor(answer.prompt_logprobs), want, rtol=0, atol=1e-3)
    assert (torch.tensor(answers[0][0].prompt_logprobs) - torch.tensor(answers[1][0].prompt_logprobs)).abs().max() > 1


TOPICS = ["The train stops.", "I dreamed.", "We sang a song.", "The waves came."]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"const": "tell"}, "arguments": {"type": "object", "properties": {"topic": {"enum": TOPICS}},
                   "required": ["topic"], "additionalProperties": False}},
    "required": ["name", "arguments"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "grammar", [{"choice": TOPICS}, {"json": SCHEMA}, {"regex": r"(I|We) saw [a-z ]{9}\."}]
)  # fmt: skip
def test_steered_within_a_grammar(either: Host, teacher: Teacher, model: SteeredModel, grammar: Json) -> None:
    sampling = {"structured_outputs": grammar, "max_tokens": 60, "logprobs": 20}
    asked = [Ask(model.prompt, _clamp(f) if f else None, sampling) for f in (TRAINS, None, MUSIC)]
    answers = either.run(generate, asked)
    _right(teacher, asked, answers, masked=True)
    texts = [choices[0].text for choices in answers]
    assert texts[0] != texts[1], texts
    for text in texts:
        if "choice" in grammar:
            assert text in TOPICS
        elif "regex" in grammar:
            assert re.fullmatch(grammar["regex"], text)
        else:
            assert json.loads(text)["arguments"]["topic"] in TOPICS


TOOLS = [{"type": "function", "function": {"name": "tell", "parameters": SCHEMA["properties"]["arguments"]}}]
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools %}<|user|>{{ tool['function']['name'] }}{% endfor %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}<|assistant|>"
)


def test_a_steered_call_of_a_tool(engine: Host, teacher: Teacher, model: SteeredModel) -> None:
    sampling = {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60, "logprobs": 20}
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    texts = []
    for steering in (_clamp(TRAINS), None):
        ask = Ask([], steering, sampling)
        prompt, answers = engine.run(inside.chat, messages, ask, tools=TOOLS, chat_template=TEMPLATE)
        assert "tell" in model.tokenizer.decode(prompt)
        _right(teacher, [Ask(prompt, steering, sampling)], [answers], masked=True)
        texts.append(json.loads(answers[0].text))
    assert [call["name"] for call in texts] == ["tell", "tell"]
    assert texts[0] != texts[1]


def test_the_texts_of_tokens_by_a_tokenizer_of_mistrals(engine: Host, tmp_path: Path) -> None:
    """vLLM's class for them takes no options where those of transformers are told to leave spaces as they are."""
    assert engine.run(inside.token_texts, str(write_tekken(tmp_path)), "the sea .") == ["the", " sea", " ", "."]


def test_a_replaced_profile_is_for_new_requests(
    engine: Host, teacher: Teacher, model: SteeredModel, profile: Path
) -> None:
    asked = Ask(model.prompt, {"profiles": ["changing"]}, {"ignore_eos": True, "max_tokens": 40})
    seen = engine.run(inside.replaced, asked, str(profile), _profile(SEA))
    assert seen.running == 2, "the second came while the first ran"
    meant = [Ask(asked.prompt, _clamp(f), asked.sampling) for f in (TRAINS, SEA)]
    _right(teacher, meant, seen.answers)


def test_an_emptied_cache_serves_nothing(engine: Host, teacher: Teacher, model: SteeredModel) -> None:
    prompt = _chat(model, *TALK)
    asked = [Ask(prompt, _clamp(SPACE), {"max_tokens": 8})]
    cold, warm, emptied = (engine.run(generate, asked, cold=cold)[0][0] for cold in (True, False, True))
    assert (cold.cached, warm.cached, emptied.cached) == (0, 64, 0)
    assert cold.tokens == warm.tokens
    assert cold == emptied
    assert not teacher.faults(asked[0], warm, cached=True)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (inside.resumable, "prompts of tokens, which are whole"),
        (inside.embeddings, "prompt_embeds"),
        (inside.handmade, "did not come through"),
        (inside.beams, "extra_args"),
        (inside.beams_of_samples, "beam_width"),
        (inside.pooled, "SamplingParams|pooling|embed"),
    ],
)
def test_what_cannot_be_steered_is_refused(engine: Host, model: SteeredModel, way: object, message: str) -> None:
    with pytest.raises(EngineFailed, match=message):
        engine.run(way, Ask(model.prompt, _clamp(SEA)))
    assert engine.run(inside.unfinished) == (False, 0, 0)


@pytest.mark.parametrize("key", ["sae_steer_program", "sae_steer_slot", "sae_steer_ticket"])
def test_the_keys_of_the_plugin_are_its_own(engine: Host, model: SteeredModel, key: str) -> None:
    with pytest.raises(EngineFailed, match=f"extra_args.{key} is the plugin's own"):
        engine.run(generate, [Ask(model.prompt, None, {"extra_args": {key: "{}"}})])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: SteeredModel) -> dict[str, tuple[str, PreTrainedModel]]:
    """Two random LoRA adapters: the folder, and the model with the weights merged into it."""
    return {name: _adapter(tmp_path_factory.mktemp(name), model.model, seed) for seed, name in enumerate("ab", 1)}


def _adapter(folder: Path, base: PreTrainedModel, seed: int) -> tuple[str, PreTrainedModel]:
    rank, alpha, generator = 4, 8, torch.Generator().manual_seed(seed)
    merged = copy.deepcopy(base)
    tensors = {}
    modules = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    for name, module in merged.named_modules():
        if name.endswith(modules) and isinstance(module, nn.Linear):
            out, inner = module.weight.shape
            a = torch.randn(rank, inner, generator=generator) * inner**-0.5
            b = torch.randn(out, rank, generator=generator) * 0.1
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data += alpha / rank * b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder), merged


def test_adapters_and_programs_in_one_batch(
    ahead: Host, teacher: Teacher, model: SteeredModel, adapters: dict[str, tuple[str, PreTrainedModel]]
) -> None:
    prompt = _chat(model, *TALK)
    sampling = {"max_tokens": 12}
    numbers = {"a": 1, "b": 2}
    wanted = [(None, None), ("a", None), (None, SPACE), ("a", SPACE), ("b", SPACE), ("b", SEA), ("a", SEA)]
    asked = [
        Ask(prompt, _clamp(f) if f else None, sampling, lora=(name, numbers[name], adapters[name][0]) if name else None)
        for name, f in wanted
    ]
    answers = ahead.run(generate, asked)
    warm = ahead.run(generate, asked[::-1], cold=False)[::-1]  # the last are in the cache still
    assert len({str(choices[0].tokens) for choices in answers}) == len(asked), "each of them changes the answer"
    merged = {name: model for name, (_, model) in adapters.items()}
    for name in (None, "a", "b"):
        own = [i for i, (adapter, _) in enumerate(wanted) if adapter == name]
        if name is None:
            _right(teacher, [asked[i] for i in own], [answers[i] for i in own])
            continue
        with sae_steer.attach(merged[name], {model.sae: model.sae_folder}) as steer:
            _right(Teacher(steer), [asked[i] for i in own], [answers[i] for i in own])
    assert [c[0].tokens for c in warm] == [c[0].tokens for c in answers], "keys of the cache hold adapter and program"
    assert any(choices[0].cached for choices in warm)
