"""``sparse_decode`` in Triton, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer_kernels.sparse_decode.generate import generate
from tests.kernels.properties import sparse_decode as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("triton", CPU)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 9),
    width=st.integers(1, 600),
    features=st.integers(1, 90),
    k=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    bias=st.booleans(),
)
def test_any_call(seed, tokens, width, features, k, dtype, bias) -> None:
    call = generate(seed, CPU, tokens=tokens, width=width, features=features, k=k, dtype=dtype, bias=bias)
    assert not properties.wrong_tokens(call, properties.run(call, "triton"))
