"""The prefix cache: whatever came before, an answer is that of a cold cache, and what no edit touches is shared."""

import random
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from tests.vllm.conftest import BLOCK, NAME, SAE, Ask, Choice, VllmServer, complete

pytestmark = pytest.mark.timeout(600)

Json = dict[str, Any]

TRAINS, SPACE = 465, 234
TOKENS = 8
PROMPT = [random.Random(2).randrange(10, 2400) for _ in range(4 * BLOCK + 8)]
"""Four blocks, and a part of a fifth."""
RANGE = [40, 60]
NEVER = 10**6


def clamp(feature: int, **more: Any) -> Json:
    edit = {"sae": SAE, "features": [feature], "op": "clamp", "value": 1.0, "units": "reference_max"}
    return {"interventions": [edit | more]}


KINDS: dict[str, tuple[Json | None, int]] = {
    "plain": (None, NEVER),
    "all": (clamp(TRAINS), 0),
    "another": (clamp(SPACE), 0),
    "completion": (clamp(TRAINS, positions="completion"), len(PROMPT) - 1),
    "another completion": (clamp(SPACE, positions="completion"), len(PROMPT) - 1),
    "prompt": (clamp(TRAINS, positions="prompt"), 0),
    "range": (clamp(TRAINS, positions={"ranges": [RANGE]}), RANGE[0]),
}
"""What a request asks, and the first position that it may touch."""


def shared(before: str, after: str) -> int:
    """Tokens of the prompt that ``after`` must take from the cache behind ``before``: all that both have alike."""
    (_, first), (_, second) = KINDS[before], KINDS[after]
    alike = len(PROMPT) - 1 if before == after else min(first, second, len(PROMPT) - 1)
    return alike // BLOCK * BLOCK


@pytest.fixture(scope="module")
def openai_client(vllm_server: VllmServer) -> Iterator[OpenAI]:
    with vllm_server.openai() as client:
        yield client


@pytest.fixture
def salt() -> str:
    """Names a prefix cache that is empty."""
    return uuid.uuid4().hex


@pytest.fixture(scope="module")
def cold(openai_client: OpenAI) -> dict[str, Choice]:
    """Every kind's answer with an empty cache."""
    return {kind: complete(openai_client, Ask(PROMPT, steering), TOKENS) for kind, (steering, _) in KINDS.items()}


def test_every_kind_answers_otherwise(cold: dict[str, Choice]) -> None:
    answers = [tuple(round(p, 2) for p in choice.logprobs) for choice in cold.values()]
    assert len(set(answers)) == len(KINDS), "an answer that came from the wrong blocks could not be told"


def as_cold(answer: Choice, cold: Choice) -> None:
    assert answer.tokens == cold.tokens
    assert answer.logprobs == pytest.approx(cold.logprobs, abs=1e-4)


def test_any_two_in_any_order_answer_as_with_a_cold_cache(
    openai_client: OpenAI, cold: dict[str, Choice], salt: str
) -> None:
    pairs = [(before, after) for before in KINDS for after in KINDS]

    def ask(pair: tuple[str, str], at: int) -> Choice:
        # The pairs are apart from each other, by their salts; the two of a pair are not.
        return complete(openai_client, Ask(PROMPT, KINDS[pair[at]][0], f"{salt} {pair}"), TOKENS)

    with ThreadPoolExecutor(16) as pool:
        first = list(pool.map(lambda pair: ask(pair, 0), pairs))
        second = list(pool.map(lambda pair: ask(pair, 1), pairs))
    for (before, after), one, two in zip(pairs, first, second, strict=True):
        as_cold(one, cold[before])
        as_cold(two, cold[after])
        assert (one.cached, two.cached) == (0, shared(before, after)), f"{after} behind {before}"


@pytest.mark.parametrize("seed", range(3))
def test_many_in_a_row_answer_as_with_a_cold_cache(
    openai_client: OpenAI, cold: dict[str, Choice], salt: str, seed: int
) -> None:
    row = random.Random(seed).sample([*KINDS] * 2, 2 * len(KINDS))
    for at, kind in enumerate(row):
        answer = complete(openai_client, Ask(PROMPT, KINDS[kind][0], salt), TOKENS)
        as_cold(answer, cold[kind])
        assert answer.cached == max((shared(before, kind) for before in row[:at]), default=0)


def test_completion_only_takes_as_much_from_the_cache_as_plain(openai_client: OpenAI, salt: str) -> None:
    for kind in ("plain", "completion"):
        asks = [Ask(PROMPT, KINDS[asked][0], f"{salt} {kind}") for asked in ("plain", kind)]
        _, answer = [complete(openai_client, ask, TOKENS) for ask in asks]
        assert answer.cached == 4 * BLOCK


LONG = 3 * BLOCK


@pytest.mark.parametrize(
    ("steered", "by_the_same", "by_plain"),
    [
        # The reply's last token was never computed. Blocks where the prompt ended once, or ends now, are edited
        # otherwise by what is edited in one phase only.
        ("all", len(PROMPT) + LONG - 1, 0),
        ("range", len(PROMPT) + LONG - 1, RANGE[0]),
        ("completion", 4 * BLOCK, 4 * BLOCK),
        ("prompt", 4 * BLOCK, 0),
    ],
)
def test_a_steered_reply_that_comes_back_as_a_prompt(
    openai_client: OpenAI, salt: str, steered: str, by_the_same: int, by_plain: int
) -> None:
    steering = KINDS[steered][0]
    for kind, expected in (("plain", by_plain), (steered, by_the_same), ("another", 0)):
        reply = complete(openai_client, Ask(PROMPT, steering, f"{salt} {kind}"), LONG)
        again = [*PROMPT, *reply.tokens, *PROMPT[:10]]
        answer = complete(openai_client, Ask(again, KINDS[kind][0], f"{salt} {kind}"), TOKENS)
        as_cold(answer, complete(openai_client, Ask(again, KINDS[kind][0]), TOKENS))
        assert answer.cached == expected // BLOCK * BLOCK


def test_a_chat_that_goes_on_without_steering(openai_client: OpenAI, salt: str) -> None:
    first = [{"role": "user", "content": "Tell me about my garden. " * 12}]

    def say(messages: list[Json], steering: Json | None, salt: str = salt) -> tuple[str, list[float], int]:
        reply = openai_client.chat.completions.create(
            model=NAME, messages=messages, temperature=0, max_tokens=40, logprobs=True,
            extra_body={"cache_salt": salt} | ({"steering": steering} if steering is not None else {}),
        )  # fmt: skip
        (choice,) = reply.choices
        cached = reply.usage.prompt_tokens_details.cached_tokens or 0
        return choice.message.content or "", [token.logprob for token in choice.logprobs.content or ()], cached

    text, _, _ = say(first, clamp(TRAINS))
    then = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "And the sea?"}]
    warm, cold = say(then, None), say(then, None, uuid.uuid4().hex)
    assert warm[0] == cold[0]
    assert warm[1] == pytest.approx(cold[1], abs=1e-4)
    assert warm[2] == 0, "every block is behind an edit"
    steered, fresh = say(then, clamp(TRAINS)), say(then, clamp(TRAINS), uuid.uuid4().hex)
    assert steered[0] == fresh[0]
    assert steered[1] == pytest.approx(fresh[1], abs=1e-4)
    assert steered[2] >= BLOCK
