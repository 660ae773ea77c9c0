"""``feature_edit`` against its literal float64 definition."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_steer_kernels import FEATURE_EDIT, EditBuffers, EditTable, Flag, RowFloat, RowInt, SlotInt, feature_edit
from sae_steer_kernels.feature_edit import torch_impl
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.reference import gain_at
from tests.kernels.cases import Step, error, make_step, near_a_gate, reference

ON = torch.tensor(True)
VARIANTS = ["plain", "residual", "drop", "topk"]

steps = st.builds(
    make_step,
    st.integers(0, 10_000),
    tokens=st.integers(1, 12),
    width=st.sampled_from([2, 7, 16, 33]),
    rows=st.integers(1, 5),
    slots=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    variant=st.sampled_from(VARIANTS),
)


@pytest.fixture(scope="module", autouse=True, params=["torch, in one go", "torch, grouped", "numba"])
def regime(request: pytest.FixtureRequest) -> Iterator[None]:
    """The implementations for CPUs, and both ways in which torch's goes through a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FEATURE_EDIT.variable, request.param.partition(",")[0])
        if request.param == "torch, grouped":
            patch.setattr(torch_impl, "GATHERED", 0)
        yield


def run(step: Step) -> tuple[Tensor, EditBuffers]:
    out, buffers = step.y.clone(), step.buffers()
    feature_edit(out, step.slots, step.bits, ON, step.table, buffers, **step.extras)
    return out, buffers


@settings(max_examples=150)
@given(steps)
def test_equals_the_definition(step: Step) -> None:
    expected, before, after, dose, flags = reference(step)
    if near_a_gate(step, before).any():
        return
    out, buffers = run(step)
    assert buffers.flags.tolist() == flags.tolist()
    assert error(out, expected) <= FEATURE_EDIT.tolerances[step.y.dtype]
    for t in (step.slots > 0).nonzero().flatten().tolist():
        used = int(step.table.slot_int[step.slots[t], SlotInt.ROWS])
        torch.testing.assert_close(buffers.before[t, :used].double(), before[t, :used], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(buffers.after[t, :used].double(), after[t, :used], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(buffers.dose.double(), dose, atol=1e-3, rtol=1e-2)


@settings(max_examples=60)
@given(steps)
def test_rows_without_a_slot_are_untouched_to_the_bit(step: Step) -> None:
    out, buffers = run(step)
    idle = step.slots == 0
    assert torch.equal(out[idle], step.y[idle])
    assert not buffers.flags[idle].any()
    assert not buffers.dose[idle].any()


@settings(max_examples=60)
@given(steps, st.randoms())
def test_a_token_does_not_depend_on_its_neighbours(step: Step, random: object) -> None:
    order = torch.randperm(step.y.shape[0])[: max(1, step.y.shape[0] // 2)]
    whole, _ = run(step)
    part, _ = run(step.take(order))
    torch.testing.assert_close(part, whole[order], atol=1e-4, rtol=FEATURE_EDIT.tolerances[step.y.dtype])


def test_reads_one_tensor_and_writes_another() -> None:
    step = make_step(3, tokens=9, width=8, width_out=12, rows=4, slots=3)
    expected, *_ = reference(step)
    out, _ = run(step)
    assert error(out, expected) <= FEATURE_EDIT.tolerances[torch.float32]


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_and_idle_steps(tokens: int) -> None:
    step = make_step(1, tokens=tokens, width=8, rows=2, slots=2)
    out, buffers = step.y.clone(), step.buffers()
    feature_edit(out, step.slots, step.bits, torch.tensor(False), step.table, buffers)
    assert torch.equal(out, step.y)
    assert not buffers.flags.any()


def test_a_row_that_is_not_finite_is_left_alone_and_flagged() -> None:
    step = make_step(5, tokens=6, width=8, rows=3, slots=2, dtype=torch.float16)
    step.slots[:] = 1
    step.bits[:] = 7
    step.table.slot_float[:] = math.inf
    step.table.row_int[..., RowInt.WHEN_ROW] = -1
    step.table.row_int[..., RowInt.SELECT] = 7
    step.table.row_float[..., RowFloat.SHIFT] = 1e6
    step.table.row_float[..., RowFloat.HI] = math.inf
    out, buffers = run(step)
    bad = (buffers.flags & Flag.NON_FINITE) != 0
    assert bad.any()
    assert torch.equal(out[bad], step.y[bad])
    assert out.isfinite().all()


def test_gain_is_one_at_zero_and_never_interpolates_across_it() -> None:
    table = torch.tensor([[0.2, 0.4, 0.8], [0.5, 0.5, 0.1]])
    assert gain_at(0.0, table, 1.0, 1.0) == 1.0
    assert gain_at(1e-9, table, 1.0, 1.0) == pytest.approx(0.2)
    assert gain_at(1.0, table, 1.0, 1.0) == pytest.approx(0.3)
    assert gain_at(99.0, table, 1.0, 1.0) == pytest.approx(0.8)
    assert gain_at(-2.0, table, 1.0, 1.0) == pytest.approx(0.3)
    assert gain_at(-2.0, table, 1.0, 0.0) == 1.0


def _forget_bias(step: Step) -> None:
    step.table.row_float[..., RowFloat.BIAS] = 0


def _forget_gate(step: Step) -> None:
    step.table.row_int[..., RowInt.WHEN_ROW] = -1


def _forget_selectors(step: Step) -> None:
    step.table.row_int[..., RowInt.SELECT] = 7


def _forget_units(step: Step) -> None:
    step.table.row_int[..., RowInt.NORM_UNITS] = 0


def _forget_norms(step: Step) -> None:
    step.table.row_int[..., RowInt.NORM] = 0


def _forget_limit(step: Step) -> None:
    step.table.slot_float[:] = math.inf


def _forget_mask(step: Step) -> None:
    step.table.row_float[..., RowFloat.MASK_LO] = math.inf


def _forget_gain(step: Step) -> None:
    step.table.row_float[..., RowFloat.GAMMA] = 0


def _wrong_slot(step: Step) -> None:
    step.slots.copy_(torch.where(step.slots > 0, step.slots % 3 + 1, 0))


@pytest.mark.parametrize(
    "spoil",
    [
        _forget_bias, _forget_gate, _forget_selectors, _forget_units, _forget_norms, _forget_limit, _forget_mask,
        _forget_gain, _wrong_slot,
    ],
)  # fmt: skip
def test_a_wrong_variant_fails(spoil: Callable[[Step], None]) -> None:
    step = make_step(11, tokens=40, width=16, rows=5, slots=3)
    expected, *_ = reference(step)
    assert error(run(step)[0], expected) <= FEATURE_EDIT.tolerances[torch.float32]
    spoil(step)
    assert error(run(step)[0], expected) > 10 * FEATURE_EDIT.tolerances[torch.float32]


def _arguments(step: Step, *, grouped: bool) -> tuple[object, ...]:
    buffers = step.buffers()
    outputs = (buffers.before.zero_(), buffers.after.zero_(), buffers.dose.zero_(), buffers.flags.zero_())
    call = (step.y.clone(), step.slots, step.bits, ON, *step.tables, *outputs)
    if not grouped:
        return call
    groups = TokenGroups.empty(tokens=step.y.shape[0], slots=step.table.enc.shape[0], device=step.y.device)
    return (*call, None, None, None, None, torch.zeros(9), groups.order, groups.tiles, False)


@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(grouped: bool) -> None:
    step = make_step(2, tokens=6, width=8, rows=3, slots=2)
    torch.library.opcheck(FEATURE_EDIT.overload, _arguments(step, grouped=grouped))


def test_compiles_into_a_full_graph() -> None:
    step = make_step(2, tokens=6, width=8, rows=3, slots=2)
    buffers = step.buffers()

    def forward(y: Tensor, active: Tensor) -> Tensor:
        y = y * 2
        feature_edit(y, step.slots, step.bits, active, step.table, buffers)
        return y + 1

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(step.y, ON), forward(step.y, ON))
    # The flag is an input of the graph, not baked into it.
    torch.testing.assert_close(compiled(step.y, torch.tensor(False)), step.y * 2 + 1)


def test_the_override_must_name_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FEATURE_EDIT.variable, "abacus")
    with pytest.raises(LookupError, match="SAE_STEER_FEATURE_EDIT takes: torch, numba"):
        FEATURE_EDIT.implementation(torch.device("cpu"))


def test_empty_tables_do_nothing() -> None:
    step = make_step(4, tokens=5, width=8, rows=3, slots=2)
    step.table = EditTable.empty(slots=2, rows=3, width=8, width_out=8, dtype=torch.float32, device=torch.device("cpu"))
    out, buffers = run(step)
    assert torch.equal(out, step.y)
    assert not buffers.flags.any()
