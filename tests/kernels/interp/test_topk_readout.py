"""``topk_readout`` in Triton, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer_kernels import Act, Norm
from sae_steer_kernels.topk_readout.generate import generate
from tests.kernels.properties import topk_readout as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("triton", CPU)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 9),
    width=st.integers(2, 70),
    features=st.integers(1, 200),
    k=st.integers(1, 9),
    act=st.sampled_from([act for act in Act if act is not Act.IDENTITY]),
    norm=st.sampled_from(list(Norm)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    residual=st.booleans(),
)
def test_any_call(seed, tokens, width, features, k, act, norm, dtype, residual) -> None:
    call = generate(
        seed, CPU, tokens=tokens, width=width, features=features, act=act, norm=norm, dtype=dtype, residual=residual,
        topk=max(1, features // 6),
    )  # fmt: skip
    assert not properties.disagreements(call, k, *properties.run(call, k, "triton"))
