"""``feature_edit`` as machine code: no spills, wide loads, tensor cores, room in shared memory."""

from pathlib import Path

import pytest
import torch

from sae_steer_kernels import EditBuffers, EditTable
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.regimes import Regime, grouped_floats, two_phase_floats
from tests.kernels.aot.harness import TARGETS, Machine, compiling

META = torch.device("meta")
TENSOR_CORES = {"sm_80": r"\bHMMA", "sm_90": "HGMMA", "gfx942": "v_mfma_"}
WIDE = {
    "sm_80": r"LDG\.E\.(?:[A-Z]+\.)*128",
    "sm_90": r"LDG\.E\.(?:[A-Z]+\.)*128",
    "gfx942": "(?:global|buffer)_load_dwordx4",
}
COPIES = {"sm_80": r"LDGSTS\.E\.[A-Z.]*128", "sm_90": r"LDGSTS\.E\.[A-Z.]*128", "gfx942": WIDE["gfx942"]}


def _compiled(
    regime: Regime,
    target: str,
    cache: Path,
    *,
    width: int = 4096,
    rows: int = 64,
    tokens: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    everything: bool = False,
) -> dict[str, Machine]:
    """The kernels of a call, by name."""
    from sae_steer_kernels.feature_edit.triton_impl import feature_edit_triton

    table = EditTable.empty(slots=32, rows=rows, width=width, width_out=width, dtype=dtype, device=META, gain_bins=64)
    buffers = EditBuffers.empty(tokens=tokens, rows=rows, device=META)
    y = torch.empty(tokens, width, dtype=dtype, device=META)
    of_tokens = torch.empty(tokens, dtype=torch.int32, device=META)
    size = max(two_phase_floats(tokens, width), grouped_floats(tokens, rows, width, width))
    groups = TokenGroups.empty(tokens=tokens, slots=33, device=META)
    extras = (None, None, None, None)
    if everything:
        extras = (y.clone(), y, torch.empty(tokens, width, device=META), of_tokens[:, None].expand(tokens, rows))
    with compiling(target, cache) as machines:
        feature_edit_triton(
            y, of_tokens, of_tokens, *table.tensors, buffers.before, buffers.after, buffers.dose, buffers.flags,
            *extras, torch.empty(size, device=META), groups.order, groups.tiles,
            regime=regime,
        )  # fmt: skip
    return {machine.kernel: machine for machine in machines}


def _check(machine: Machine) -> None:
    """No memory is used for want of registers, and there is room for a program."""
    assert machine.count(r"\b(?:LDL|STL)\b|scratch_(?:load|store)") == 0, machine.row
    if machine.target.startswith("gfx"):
        # A spilled scalar register goes to a lane of a vector register there, not to memory.
        assert machine.count(r"\.vgpr_spill_count: +0\b") == 1, machine.row
        assert machine.count(r"\.private_segment_fixed_size: +0\b") == 1, machine.row
    assert machine.registers <= 255
    assert machine.shared <= TARGETS[machine.target][1], machine.row
    assert machine.float_atomics == 0, machine.row


@pytest.mark.parametrize("width", [2304, 8192])
@pytest.mark.parametrize("target", TARGETS)
def test_rows(target: str, width: int, cache: Path) -> None:
    machine = _compiled(Regime.ROW, target, cache, width=width, rows=8, tokens=32)["edit_row"]
    _check(machine)
    assert machine.count(WIDE[target]) >= 10
    # One load in two bytes would be a token or a decoder row, read element by element.
    assert machine.count(r"LDG\.E\.U16|global_load_u?short") == 0


@pytest.mark.parametrize("target", TARGETS)
def test_two_phase(target: str, cache: Path) -> None:
    machines = _compiled(Regime.TWO_PHASE, target, cache, tokens=32)
    assert set(machines) == {"edit_split", "finish_row"}
    for machine in machines.values():
        _check(machine)
        assert machine.count(WIDE[target]) >= 5
        assert machine.count(r"LDG\.E\.U16|global_load_u?short") == 0


@pytest.mark.parametrize("target", TARGETS)
def test_grouped(target: str, cache: Path) -> None:
    machines = _compiled(Regime.GROUPED, target, cache)
    assert set(machines) == {"encode_tiles", "coefficient_tiles", "measure_tiles", "write_tiles"}
    for machine in machines.values():
        _check(machine)
    for name in ("encode_tiles", "measure_tiles", "write_tiles"):
        assert machines[name].count(TENSOR_CORES[target]) > 0, name
        assert machines[name].count(WIDE[target]) + machines[name].count(COPIES[target]) > 0, name


@pytest.mark.parametrize("regime", Regime)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, regime: Regime, cache: Path) -> None:
    tokens = 2048 if regime is Regime.GROUPED else 32
    machines = _compiled(regime, "sm_90", cache, tokens=tokens, rows=16, dtype=dtype)
    for machine in machines.values():
        _check(machine)
    if regime is Regime.GROUPED:
        assert ("fit_tiles" in machines) == (dtype is torch.float16)


@pytest.mark.parametrize("regime", Regime)
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS if t != "sm_90")]
)
def test_every_input(target: str, regime: Regime, cache: Path) -> None:
    tokens = 2048 if regime is Regime.GROUPED else 32
    for machine in _compiled(regime, target, cache, tokens=tokens, everything=True).values():
        _check(machine)


def test_an_odd_width_is_right_but_not_wide(cache: Path) -> None:
    """What the assertions above see: without alignment there are no wide loads of tokens."""
    odd = _compiled(Regime.ROW, "sm_90", cache, width=2305, rows=8, tokens=32)["edit_row"]
    even = _compiled(Regime.ROW, "sm_90", cache, width=2304, rows=8, tokens=32)["edit_row"]
    assert odd.count(WIDE["sm_90"]) < even.count(WIDE["sm_90"]) / 4


def test_what_the_kernels_cannot_take_is_refused() -> None:
    from sae_steer_kernels.feature_edit.triton_impl import supports

    def obstacle(width: int, dtype: torch.dtype = torch.bfloat16, residual: torch.Tensor | None = None) -> str:
        table = EditTable.empty(slots=1, rows=1, width=width, width_out=width, dtype=dtype, device=META)
        buffers = EditBuffers.empty(tokens=4, rows=1, device=META)
        y, outputs = torch.empty(4, width, dtype=dtype, device=META), (buffers.before, buffers.after)
        return supports(y, y, y, *table.tensors, *outputs, buffers.dose, buffers.flags, None, residual)

    assert obstacle(64) == ""
    assert "columns" in obstacle(16384)
    assert "float64" in obstacle(64, torch.float64)
    assert "residual" in obstacle(64, residual=torch.empty(64, 4, device=META).T)
