"""``feature_edit`` in Triton, interpreted: every regime keeps every property."""

from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings

from sae_steer_kernels import FEATURE_EDIT, RowInt, feature_edit
from sae_steer_kernels.feature_edit import triton_impl, triton_rows
from sae_steer_kernels.feature_edit.generate import generate
from sae_steer_kernels.feature_edit.regimes import Regime
from tests.kernels.cases import Step, make_step
from tests.kernels.properties import feature_edit as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_") and name != "check_wrong"]

ways = pytest.mark.parametrize("way", properties.KERNELS)


@ways
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check: Any, way: str) -> None:
    check(way, CPU)


@ways
@settings(max_examples=25)
@given(step=properties.steps)
def test_equals_the_definition(way: str, step: Any) -> None:
    assert not properties.disagreement(step, way)


@pytest.mark.slow
@ways
@pytest.mark.parametrize("sizes", properties.REAL_SIZES, ids=properties.name_of)
def test_equals_the_definition_in_real_sizes(way: str, sizes: Any) -> None:
    assert not properties.disagreement(make_step(7, **sizes), way)


@pytest.mark.parametrize("wrong", properties.WRONG)
def test_what_is_forgotten_is_seen(wrong: str) -> None:
    properties.check_wrong("row", CPU, wrong)


@pytest.mark.parametrize("tokens", [5, 33, 300])
def test_the_op_takes_the_regime_that_fits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FEATURE_EDIT.variable, "triton")
    call = generate(3, CPU, tokens=tokens, width=32, rows=16, slots=3)
    if tokens == 33:
        call["slots"][4:] = 0  # one row after the other takes its time here
    step = Step(call["table"], call["y"].clone(), call["slots"], call["bits"])
    taken: list[Regime] = []
    original = triton_impl.choose
    monkeypatch.setattr(triton_impl, "choose", lambda *a, **k: taken.append(original(*a, **k)) or taken[-1])
    feature_edit(**call)
    assert taken == [{5: Regime.TWO_PHASE, 33: Regime.ROW, 300: Regime.GROUPED}[tokens]]
    assert not properties.difference(step, call["y"], call["buffers"], within=1e-5)


def test_little_scratch_is_refused() -> None:
    call = generate(3, CPU, tokens=5, width=32, rows=16, slots=3)
    b = call["buffers"]
    outputs = (b.before, b.after, b.dose, b.flags)
    arguments = (call["y"], call["slots"], call["bits"], *call["table"].tensors, *outputs, None, None, None, None)
    with pytest.raises(ValueError, match="floats of scratch"):
        triton_impl.feature_edit_triton(*arguments, torch.zeros(9), regime=Regime.TWO_PHASE)


def test_tokens_grouped_by_other_slots_than_theirs_are_seen() -> None:
    step = make_step(2, tokens=9, width=16, rows=5, slots=3)
    assert not properties.disagreement(step, "grouped")
    assert properties.disagreement(step, "grouped", stale=True)


def _forget(name: str, instead: Any) -> Any:
    return lambda patch: patch.setattr(triton_rows, name, instead)


@pytest.mark.parametrize(
    ("patch", "check"),
    [
        pytest.param(_forget("_ROWS", tl.constexpr(3)), properties.check_definition, id="reads another number of rows"),
        pytest.param(
            _forget("_OVER_DOSE", tl.constexpr(0)), properties.check_definition, id="does not say what it cut"
        ),
        pytest.param(
            _forget("_NON_FINITE", tl.constexpr(0)),
            properties.check_what_is_not_finite_stays_where_it_is,
            id="does not say what was not finite",
        ),
        pytest.param(
            _forget("_WHEN_ROW", tl.constexpr(int(RowInt.TOPK))),
            properties.check_gates_of_every_block,
            id="takes row 0 for every gate",
        ),
    ],
)
def test_a_wrong_kernel_is_seen(patch: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check("row", CPU)
