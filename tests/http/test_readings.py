"""How much one answer may read: what is foretold is refused, what is not ends the answer; to the number."""

from typing import Any

import pytest

from sae_steer.errors import LimitExceeded, ReadingsExceeded
from sae_steer.limits import Limits
from sae_steer.program import Phase, Program, Reading, Row, Selector, SiteProgram
from sae_steer.readings import computed_values, reading_values
from sae_steer.sites import Site
from sae_steer_http.readings import COMPUTED, ReadingBudget, check_reading_size

SITE = Site.parse("resid_post.1")
LIMITS = Limits(max_reading_values=100)


def program(*, per_token: bool, top_k: int = 0, features: int = 2) -> Program:
    rows = tuple(Row("sha256:a", i) for i in range(features))
    reading = Reading(SITE, "sha256:a", tuple(range(features)), 0, top_k, per_token=per_token)
    return Program((SiteProgram(SITE, rows),), (Selector(Phase.ALL),), readings=(reading,))


def size(asked: Program | None, prompts: list[int], max_tokens: int | None, choices: int = 1) -> None:
    check_reading_size(asked, LIMITS, prompts, max_tokens, choices=choices)


def test_what_is_sent_is_limited_to_the_number() -> None:
    asked = program(per_token=True)
    size(asked, [40], 11)  # 50 tokens of two values
    size(asked, [20], 6, choices=2)
    size(asked, [50], None)  # nothing is known but the prompt
    size(None, [10**6], 10**6)
    with pytest.raises(LimitExceeded, match="102 activations") as error:
        size(asked, [40], 12)
    assert error.value.param == "steering.readings"
    for prompts, new, choices in (([20], 7, 2), ([20, 21], 6, 1), ([51], None, 1)):
        with pytest.raises(LimitExceeded, match="activations"):
            size(asked, prompts, new, choices)


@pytest.mark.parametrize(("top_k", "width"), [(0, 2), (7, 16), (128, 258)])
def test_what_is_only_summed_up_is_limited_too(top_k: int, width: int) -> None:
    """The answer would hold nothing of a token, but the server computes and keeps all of it."""
    asked = program(per_token=False, top_k=top_k)
    tokens = COMPUTED * LIMITS.max_reading_values // width
    assert reading_values(asked, 1, tokens) == 0
    assert computed_values(asked, 1, tokens) == tokens * width
    size(asked, [1], tokens)
    size(asked, [tokens // 2], 1, choices=2)
    with pytest.raises(LimitExceeded, match="sum up") as error:
        size(asked, [1], tokens + 1)
    assert error.value.param == "steering.readings"
    with pytest.raises(LimitExceeded, match="sum up"):
        size(asked, [tokens // 2 + 1], 1, choices=2)


@pytest.mark.parametrize(
    ("takes", "last"),
    [
        ([(60, 60), (40, 40)], (1, 1)),
        ([(0, COMPUTED * 100 - 1), (0, 1)], (0, 1)),  # nothing is sent
    ],
)
def test_an_answer_is_ended_where_it_passes_either(takes: list[Any], last: Any) -> None:
    budget = ReadingBudget(LIMITS)
    for values, computed in takes:
        budget.take(values, computed)
    with pytest.raises(ReadingsExceeded):
        budget.take(*last)
