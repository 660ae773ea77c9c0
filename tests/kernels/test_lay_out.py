"""``lay_out`` on a CPU: both implementations against the definition, and what a wrong one would be told by."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_steer_kernels import LAY_OUT, BucketTokens, StepTokens
from tests.kernels.properties import lay_out as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]


@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check: Any, name: str) -> None:
    check(LAY_OUT.implementations[name], CPU)


def test_a_cpu_takes_what_is_compiled() -> None:
    assert LAY_OUT.provider(CPU) == "numba"  # it comes with what the tests need
    assert LAY_OUT.provider(torch.device("cuda")) == "torch"


def test_an_unknown_implementation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAY_OUT.variable, "abacus")
    with pytest.raises(LookupError, match="SAE_STEER_LAY_OUT takes: torch, numba"):
        LAY_OUT.implementation(CPU)


# ------------------------------------------------------------------------------------------- wrong variants


def counts_again(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Forgets what was computed before."""
    LAY_OUT.reference(tokens, [replace(bucket, seen=torch.full_like(bucket.seen, -1)) for bucket in buckets])


def of_any_token(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Does not ask for the token's id."""
    LAY_OUT.reference(tokens, [replace(bucket, by_token=torch.full_like(bucket.by_token, -1)) for bucket in buckets])


def reads_what_is_edited(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Reads every token on which anything holds."""
    LAY_OUT.reference(tokens, [replace(bucket, reads=torch.full_like(bucket.reads, -1)) for bucket in buckets])


def of_the_last_bucket(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Lets each bucket overwrite what the one before has said of all tokens."""
    for bucket in buckets:
        LAY_OUT.reference(tokens, [bucket])


def a_piece_late(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Takes a mask to hold after the position that it holds from."""
    late = [replace(b, starts=b.starts + ((b.starts > 0) & (b.starts < properties.NEVER)).long()) for b in buckets]
    LAY_OUT.reference(tokens, late)


def nobody_s_is_the_last_one_s(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Takes padding for tokens of the last request."""
    starts = tokens.starts.clone()
    starts[buckets[0].rows.shape[0] - 1 :] = tokens.positions.shape[0]
    LAY_OUT.reference(replace(tokens, starts=starts), buckets)


def remembers_nothing(tokens: StepTokens, buckets: list[BucketTokens]) -> None:
    """Does not say how far the requests have come."""
    LAY_OUT.reference(tokens, [replace(bucket, seen=bucket.seen.clone()) for bucket in buckets])


WRONG = [
    remembers_nothing,
    counts_again,
    of_any_token,
    reads_what_is_edited,
    of_the_last_bucket,
    a_piece_late,
    nobody_s_is_the_last_one_s,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_variants_do_not_pass(wrong: Any) -> None:
    with pytest.raises(AssertionError, match="seed"):
        properties.check_random_steps(wrong, CPU)
