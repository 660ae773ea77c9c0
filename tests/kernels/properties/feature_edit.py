"""What every implementation of ``feature_edit`` must keep, on whatever device: ``check_…`` take a way and a device.

A way is "torch", or the name of a regime of the kernels. What the kernels get lies between poisoned bands, unused table
rows are poisoned, and so is all that they are to write.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sae_steer_kernels import (
    FEATURE_EDIT,
    Act,
    EditBuffers,
    EditTable,
    Flag,
    Norm,
    RowFloat,
    RowInt,
    SlotFloat,
    SlotInt,
)
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.regimes import Regime, grouped_floats, two_phase_floats
from tests.kernels.cases import Step, error, make_step, near_a_gate, reference
from tests.kernels.guards import Guards, poison

steps = st.builds(
    make_step,
    st.integers(0, 10_000),
    tokens=st.integers(1, 6),
    width=st.sampled_from([2, 7, 16, 33, 70]),
    rows=st.integers(1, 9),
    slots=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    variant=st.sampled_from(["plain", "residual", "drop", "topk"]),
)
REAL_SIZES: list[dict[str, Any]] = [
    {"tokens": 33, "width": 2304, "rows": 16, "slots": 4, "dtype": torch.bfloat16},
    {"tokens": 65, "width": 768, "rows": 64, "slots": 3, "variant": "residual", "dtype": torch.float16},
    {"tokens": 130, "width": 96, "width_out": 160, "rows": 70, "slots": 1},
    {"tokens": 5, "width": 5120, "rows": 5, "slots": 5, "variant": "drop", "dtype": torch.bfloat16},
    {"tokens": 3, "width": 8192, "rows": 3, "slots": 2},
]


def name_of(sizes: dict[str, Any]) -> str:
    """Name of a case in ``REAL_SIZES``."""
    return "x".join(str(sizes[name]) for name in ("tokens", "width", "rows"))


KERNELS = [regime.value for regime in Regime]
# A token's bits do not depend on where it stands among others; the others multiply matrices.
BY_TOKEN = ("row", "two-phase")


def run(step: Step, way: str, *, gap: int = 0, stale: bool = False, guarded: bool = True) -> tuple[Tensor, EditBuffers]:
    """The written tensor and the report of a step.

    Args:
        step: The step.
        way: "torch" or the name of a regime.
        gap: Elements between the rows of the tensors that hosts own.
        stale: Groups the tokens by other slots than they have.
        guarded: Whether the tables are copied and poisoned; large ones are not.
    """
    guards = Guards()
    tokens, (rows, width), width_out = step.y.shape[0], step.table.enc.shape[1:], step.table.dec.shape[2]
    table = _without_unused_rows(step.table) if guarded and way != "torch" else step.table
    tables = [guards.copy(t) if guarded else t for t in table.tensors]
    y = guards.copy(step.y, gap=gap)
    outputs = [guards.copy(poison(t)) for t in _outputs(step.buffers())]
    extras = [None if t is None else guards.copy(t, gap=gap) for t in step.extras.values()]
    call = (y, guards.copy(step.slots), guards.copy(step.bits), *tables, *outputs, *extras)
    if way == "torch":
        FEATURE_EDIT.implementations["torch"](*call, None, None, None, False)
    else:
        from sae_steer_kernels.feature_edit.triton_impl import feature_edit_triton

        size = {"row": 0, "two-phase": two_phase_floats(tokens, width_out)}.get(way)
        size = grouped_floats(tokens, rows, width, width_out) if size is None else size
        scratch = guards.copy(poison(torch.empty(size, device=step.y.device)))
        slots = step.slots.roll(1) if stale else step.slots
        groups = TokenGroups.empty(tokens=tokens, slots=tables[0].shape[0], device=step.y.device)
        groups = groups.fill(slots, tables[0].shape[0])
        grouped = (guards.copy(groups.order), guards.copy(groups.tiles))
        feature_edit_triton(*call, scratch, *grouped, regime=Regime(way))
    guards.check()
    return y.clone(), EditBuffers(*outputs)


def _outputs(buffers: EditBuffers) -> tuple[Tensor, ...]:
    return buffers.before, buffers.after, buffers.dose, buffers.flags


def _without_unused_rows(table: EditTable) -> EditTable:
    """A copy whose rows beyond those in use are poisoned, and whose slot 0 is."""
    copy = EditTable(*(t.clone() for t in table.tensors))
    used = table.slot_int[:, SlotInt.ROWS]
    numbers = torch.arange(table.enc.shape[1], device=used.device)
    unused = numbers[None, :] >= used[:, None]
    unused[0] = True
    for t in (copy.enc, copy.dec, copy.row_float, copy.row_int, copy.gain):
        t[unused] = poison(t.new_empty(()))
    return copy


def disagreement(step: Step, way: str, *, stale: bool = False, gap: int = 0) -> str:
    """How a way differs from the definition by more than it may; "" = it does not."""
    out, buffers = run(step, way, stale=stale, gap=gap)
    # Tensor cores put float32 together from bfloat16, to some 2^-17.
    if found := difference(step, out, buffers, within=1e-4 if way == "grouped" and step.y.is_cuda else 1e-5):
        return found
    if way != "torch":
        for t in (step.slots > 0).nonzero().flatten().tolist():
            beyond = int(step.table.slot_int[step.slots[t], SlotInt.ROWS])
            if not (buffers.before[t, beyond:].isnan().all() and buffers.after[t, beyond:].isnan().all()):
                return f"the report of token {t} was written beyond the rows in use"
    return ""


def difference(step: Step, out: Tensor, buffers: EditBuffers, *, within: float) -> str:
    """How a result differs from the definition's by more than it may; "" = it does not.

    Tokens too near a gate are left out, since float32 may fall on its other side; most of a step must not be.

    Args:
        step: The step, as it was before.
        out: The written tensor.
        buffers: The report.
        within: How near is too near.
    """
    expected, before, after, dose, flags = reference(step)
    near = near_a_gate(step, before, within=within)
    assert near.sum() <= max(1, len(near) // 4), "the step is of no use"
    if not torch.equal(buffers.flags.cpu()[~near], flags[~near]):
        return f"flags {buffers.flags.tolist()}, not {flags.tolist()}"
    if not error(out.cpu()[~near], expected[~near]) <= FEATURE_EDIT.tolerances[step.y.dtype]:
        return f"an error of {error(out.cpu()[~near], expected[~near]):.1e}"
    if not torch.allclose(buffers.dose.double().cpu()[~near], dose[~near], atol=1e-3, rtol=1e-2):
        return f"dose {buffers.dose.tolist()}, not {dose.tolist()}"
    for t in ((step.slots.cpu() > 0) & ~near).nonzero().flatten().tolist():
        used = int(step.table.slot_int[step.slots[t], SlotInt.ROWS])
        for name, mine, theirs in (("before", buffers.before, before), ("after", buffers.after, after)):
            if not torch.allclose(mine[t, :used].double().cpu(), theirs[t, :used], atol=1e-3, rtol=1e-3):
                return f"{name} of token {t}: {mine[t, :used].tolist()}, not {theirs[t, :used].tolist()}"
    return ""


def _step(device: torch.device, seed: int = 11, **sizes: Any) -> Step:
    return make_step(seed, **{"tokens": 8, "width": 20, "rows": 5, "slots": 3, **sizes}).to(device)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, signs of zeros and NaN included."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def check_definition(way: str, device: torch.device) -> None:
    sizes = [
        {"width": 7, "variant": "drop"},
        {"width": 33, "variant": "residual", "dtype": torch.float16},
        {"width": 16, "variant": "topk", "dtype": torch.bfloat16},
        {"width": 8, "width_out": 12, "dtype": torch.float16},
        {"rows": 1, "slots": 1, "tokens": 3},
        {"tokens": 9, "rows": 19, "slots": 8},
    ]
    for seed, size in enumerate(sizes):
        assert not disagreement(_step(device, 20 + seed, **size), way), size


def check_idle_tokens_keep_their_bits(way: str, device: torch.device) -> None:
    step = _step(device)
    step.y[0, :2] = torch.tensor([-0.0, math.nan])
    step.slots[0] = 0
    out, buffers = run(step, way)
    idle = step.slots == 0
    assert _same(out[idle], step.y[idle])
    assert not buffers.flags[idle].any()
    assert not buffers.dose[idle].any()


def check_nothing_to_do(way: str, device: torch.device) -> None:
    step = _step(device, tokens=0)
    assert run(step, way)[0].shape == step.y.shape
    step = _step(device)
    step.slots.zero_()
    out, buffers = run(step, way)
    assert _same(out, step.y)
    assert not buffers.flags.any()


def check_numbers_of_slots_do_not_matter(way: str, device: torch.device) -> None:
    step = _step(device)
    other = torch.tensor([0, 3, 1, 2], device=device)  # slot 1 becomes 3, and so on
    moved = [t.clone() for t in step.table.tensors]
    for t, own in zip(moved, step.table.tensors, strict=True):
        t[other] = own
    permuted = replace(step, table=EditTable(*moved), slots=other[step.slots.long()].int())
    assert _same(run(permuted, way)[0], run(step, way)[0])


def check_neighbours_do_not_matter(way: str, device: torch.device) -> None:
    step = _step(device)
    whole, report = run(step, way)
    for chosen in ([5], [3, 2, 7]):
        tokens = torch.tensor(chosen, device=device)
        part, own = run(step.take(tokens), way)
        if way in BY_TOKEN:
            assert _same(part, whole[tokens])
            assert _same(own.dose, report.dose[tokens])
        else:
            torch.testing.assert_close(part, whole[tokens], atol=1e-4, rtol=1e-4)


def check_two_launches_give_the_same_bits(way: str, device: torch.device) -> None:
    step = _step(device, dtype=torch.bfloat16)
    (first, a), (second, b) = run(step, way), run(step, way)
    assert _same(first, second)
    assert all(_same(x, y) for x, y in zip(_outputs(a), _outputs(b), strict=True))


def check_edits_that_change_nothing_keep_the_bits(way: str, device: torch.device) -> None:
    if way == "torch":
        return  # it adds a zero, which makes 0 of -0
    step = _step(device, dtype=torch.float16)
    floats = step.table.row_float
    for column, value in (
        (RowFloat.SCALE, 1.0), (RowFloat.SHIFT, 0.0), (RowFloat.LO, -math.inf), (RowFloat.HI, math.inf),
        (RowFloat.MASK_LO, math.inf), (RowFloat.GAMMA, 0.0),
    ):  # fmt: skip
        floats[..., column] = value
    step.table.slot_int[:, SlotInt.SKIPS] = 0
    step.y[:, ::3] = -0.0
    out, buffers = run(step, way)
    assert _same(out, step.y)
    assert buffers.flags.any()


def check_what_is_not_finite_stays_where_it_is(way: str, device: torch.device) -> None:
    step = _step(device, tokens=7)
    step.slots[:] = torch.tensor([1, 2, 3, 1, 2, 3, 1])
    step.bits[:] = 7
    step.table.row_int[..., RowInt.SELECT] = 7
    clean, _ = run(step, way)
    spoilt = replace(step, y=step.y.clone())
    spoilt.y[1, 4], spoilt.y[3, 0], spoilt.y[5, -1] = math.nan, math.inf, -math.inf
    out, buffers = run(spoilt, way)
    bad = torch.tensor([False, True, False, True, False, True, False], device=device)
    assert _same(out[bad], spoilt.y[bad])
    assert _same(out[~bad], clean[~bad])
    assert (((buffers.flags & Flag.NON_FINITE) != 0) == bad).all()


def check_what_does_not_fit_may_fit_within_the_limit(way: str, device: torch.device) -> None:
    step = _step(device, tokens=6, width=80, dtype=torch.float16)
    step.slots[:] = torch.tensor([1, 2, 1, 2, 1, 2])
    step.bits[:] = 1
    floats, ints = step.table.row_float, step.table.row_int
    floats[..., RowFloat.SCALE], floats[..., RowFloat.SHIFT], floats[..., RowFloat.GAMMA] = 0.0, 3e6, 0.0
    floats[..., RowFloat.HI], floats[..., RowFloat.MASK_LO] = math.inf, math.inf
    ints[..., RowInt.SELECT], ints[..., RowInt.WHEN_ROW], ints[..., RowInt.NORM_UNITS] = 1, -1, 0
    ints[..., RowInt.NORM] = Norm.NONE
    step.table.slot_float[1, SlotFloat.DOSE_LIMIT] = math.inf
    step.table.slot_float[2, SlotFloat.DOSE_LIMIT] = 0.5
    step.table.slot_int[:, SlotInt.SKIPS] = 0
    assert not disagreement(step, way)
    flags = run(step, way)[1].flags
    assert ((flags & Flag.NON_FINITE) != 0).tolist() == [True, False] * 3
    assert ((flags & Flag.OVER_DOSE) != 0).tolist() == [False, True] * 3


def check_rows_may_lie_apart(way: str, device: torch.device) -> None:
    for variant in ("residual", "drop", "topk"):
        assert not disagreement(_step(device, variant=variant), way, gap=5)


def check_a_slot_without_rows_may_drop_the_error(way: str, device: torch.device) -> None:
    step = _step(device, variant="drop")
    step.table.slot_int[:, SlotInt.ROWS] = 0
    step.table.slot_int[:, SlotInt.DROP_SELECT] = 1
    step.slots[:], step.bits[:] = 1, 1
    assert not disagreement(step, way)
    assert (run(step, way)[1].flags & Flag.TOUCHED).all()


def check_a_threshold_is_strict(way: str, device: torch.device) -> None:
    step = _step(device, tokens=3, rows=1, slots=1)
    step.y.zero_()
    step.y[:, 0] = torch.tensor([0.5, 0.5 + 2**-20, 0.25])
    step.slots[:], step.bits[:] = 1, 1
    table = EditTable.empty(slots=1, rows=1, width=20, width_out=20, dtype=torch.float32, device=device)
    table.enc[1, 0, 0] = table.dec[1, 0, 1] = 1.0
    table.row_float[1, 0, RowFloat.THETA] = 0.5
    table.row_float[1, 0, RowFloat.SCALE] = 3.0
    table.row_int[1, 0, RowInt.ACT], table.row_int[1, 0, RowInt.SELECT] = int(Act.JUMPRELU), 1
    table.slot_int[1, SlotInt.ROWS] = 1
    _, buffers = run(replace(step, table=table), way)
    assert buffers.before[:, 0].tolist() == [0.0, 0.5 + 2**-20, 0.0]


def check_gates_of_every_block(way: str, device: torch.device) -> None:
    """A gate may stand in another block of rows than what it gates, before it or after it."""
    step = _step(device, 31, tokens=6, rows=21, slots=2, width=40)
    step.table.slot_int[:, SlotInt.ROWS] = 21
    step.table.slot_int[:, SlotInt.SKIPS] = 0
    step.table.row_int[..., RowInt.WHEN_ROW] = torch.arange(20, -1, -1, device=device, dtype=torch.int32)
    assert not disagreement(step, way)


def _set(table: str, column: int, value: float) -> Callable[[Step], None]:
    def spoil(step: Step) -> None:
        getattr(step.table, table)[..., column] = value

    return spoil


def _next_slot(step: Step) -> None:
    step.slots.copy_(torch.where(step.slots > 0, step.slots % 3 + 1, 0))


# Inputs as a kernel would see them that forgot, or mistook, something.
WRONG = {
    "bias": _set("row_float", RowFloat.BIAS, 0),
    "threshold": _set("row_float", RowFloat.THETA, 9),
    "activation": _set("row_int", RowInt.ACT, int(Act.RELU)),
    "norm": _set("row_int", RowInt.NORM, 0),
    "enc_sum": _set("row_float", RowFloat.ENC_SUM, 0),
    "units": _set("row_int", RowInt.NORM_UNITS, 0),
    "bounds": _set("row_float", RowFloat.HI, math.inf),
    "mask": _set("row_float", RowFloat.MASK_LO, math.inf),
    "gain": _set("row_float", RowFloat.GAMMA, 0),
    "gate": _set("row_int", RowInt.WHEN_ROW, -1),
    "gate's bound": _set("row_float", RowFloat.WHEN_BELOW, math.inf),
    "selector": _set("row_int", RowInt.SELECT, 7),
    "limit": _set("slot_float", SlotFloat.DOSE_LIMIT, math.inf),
    "rows": _set("slot_int", SlotInt.ROWS, 1),
    "skips": _set("slot_int", SlotInt.SKIPS, 255),
    "slot": _next_slot,
}


def check_wrong(way: str, device: torch.device, wrong: str) -> None:
    """The comparison sees what a kernel forgets."""
    step = _step(device, 2, tokens=24, width=16)
    expected, *_ = reference(step)
    WRONG[wrong](step)
    assert error(run(step, way)[0], expected) > 10 * FEATURE_EDIT.tolerances[torch.float32]
