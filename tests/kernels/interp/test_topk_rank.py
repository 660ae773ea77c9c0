"""``topk_rank`` in Triton, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer_kernels import Norm, RowFloat, RowInt, SlotInt
from sae_steer_kernels._launch import dictionary_tile
from sae_steer_kernels.topk_rank.generate import generate
from tests.kernels.properties import topk_rank as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("triton", CPU)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    width=st.integers(2, 70),
    features=st.integers(4, 150),
    rows=st.integers(1, 9),
    slots=st.integers(1, 4),
    norm=st.sampled_from(list(Norm)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    residual=st.booleans(),
)
def test_any_call(seed, tokens, width, features, rows, slots, norm, dtype, residual) -> None:
    call = generate(
        seed, CPU, tokens=tokens, width=width, features=features, rows=rows, slots=slots, norm=norm, dtype=dtype,
        residual=residual, k=max(1, features // 6),
    )  # fmt: skip
    assert not properties.disagreements(call, properties.run(call, "triton"))


def test_what_is_decided_is_not_counted_on() -> None:
    """Programs run one after another here: all tiles after the one that decides must find nothing to do."""
    call = generate(2, CPU, tokens=1, slots=1, rows=1, features=400, k=3)
    tile = dictionary_tile(1).features
    call["row_float"][:tile, RowFloat.BIAS] = 50.0
    call["row_float"][tile:, RowFloat.BIAS] = 60.0
    call["table"].slot_int[1, SlotInt.ROWS] = 1
    call["table"].row_int[1, 0, RowInt.SAE] = 0
    call["table"].row_int[1, 0, RowInt.TOPK] = 3
    call["table"].row_int[1, 0, RowInt.FEATURE] = -1
    call["table"].row_float[1, 0, RowFloat.BIAS] = 10.0
    call["slots"].fill_(1)
    assert properties.run(call, "triton").item() == tile
    call["row_float"][: tile - 2, RowFloat.BIAS] = -50.0  # two larger in the first tile: not yet decided
    assert properties.run(call, "triton").item() == 2 + tile
