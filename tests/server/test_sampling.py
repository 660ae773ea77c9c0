import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from sae_steer.errors import RequestError
from sae_steer_server.engine.sampling import Sampling, draw, probabilities, uniform


def sampling(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, **changes: Any) -> Sampling:
    return Sampling(**({"max_tokens": 1, "temperature": temperature, "top_p": top_p, "seed": seed} | changes))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(st.integers(), st.integers(0, 2**40))
def test_numbers_depend_on_seed_and_position_alone(seed: int, position: int) -> None:
    number = uniform(seed, position)
    assert 0 <= number < 1
    assert number == uniform(seed, position) == uniform(seed + 2**64, position)
    assert number != uniform(seed + 1, position)
    assert number != uniform(seed, position + 1)


def test_numbers_are_evenly_spread() -> None:
    numbers = torch.tensor([uniform(11, position) for position in range(20_000)])
    counts = numbers.histc(bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi-square, 19 degrees of freedom, one in a thousand


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.5, 0.9, 0.999, 1.0])
def test_nucleus_is_that_of_transformers(temperature: float, top_p: float) -> None:
    logits = torch.randn(8, 500) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    ours = probabilities(logits, column(*[temperature] * 8), column(*[top_p] * 8))
    assert torch.equal(ours > 0, scores > -math.inf)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), scores.softmax(-1))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.randn(1, 12)
    asked = sampling(0.8, 0.85, seed=5)
    count = 20_000
    tokens = draw(logits.expand(count, -1), [asked] * count, range(count))
    expected = probabilities(logits, column(0.8), column(0.85))[0]
    expected = expected / expected.sum() * count
    counts = tokens.bincount(minlength=12).double()
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert 3 < kept.sum() < 12
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 31.3  # 11 degrees, one in a thousand


def test_neighbours_change_nothing() -> None:
    logits = torch.randn(6, 300) * 2
    asked = [sampling(0.5 + 0.2 * i, (1.0, 0.7, 0.95)[i % 3], seed=i) for i in range(6)]
    together = draw(logits, asked, range(100, 106))
    alone = [int(draw(logits[i : i + 1], [asked[i]], [100 + i])) for i in range(6)]
    assert together.tolist() == alone


@pytest.mark.parametrize("asked", [sampling(1e-300), sampling(5e-324, 0.5), sampling(3.0, 0.0)])
def test_extremes_take_the_most_likely(asked: Sampling) -> None:
    logits = torch.randn(64, 50) * 10
    assert torch.equal(draw(logits, [asked] * 64, range(64)), logits.argmax(-1))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1000, 40), -math.inf)
    logits[:, [0, 17, 39]] = 0.0
    assert set(draw(logits, [sampling(2.0)] * 1000, range(1000)).tolist()) == {0, 17, 39}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"stop": ("a", "")}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_refusals(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        sampling(**changes).check()
    assert caught.value.param == param


def test_ordinary_requests_pass() -> None:
    sampling(0.0, 0.0, seed=-1, stop=("\n",), logprobs=20).check()
