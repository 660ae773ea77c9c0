"""The harness sees what it is for: narrow loads, spills, float atomics, tensor cores, too much shared memory."""

from pathlib import Path

import pytest
import torch

from tests.kernels.aot.harness import TARGETS, Machine, compiling

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402


@triton.jit
def _add(x, y, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n)
    if ATOMIC:
        tl.atomic_add(y + at, values, mask=at < n)
    else:
        tl.store(y + at, values, mask=at < n)


@triton.jit
def _product(a, b, c, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def _added(target: str, cache: Path, *, block: int = 4096, atomic: bool = False, n: int = 4096) -> Machine:
    x = torch.empty(n, device="meta")
    with compiling(target, cache) as machines:
        _add[(1,)](x, x, n, BLOCK=block, ATOMIC=atomic, num_warps=4, enable_fp_fusion=True)
    [machine] = machines
    return machine


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_compiles_and_does_not_run(target: str, cache: Path) -> None:
    machine = _added(target, cache)
    machine.check(registers=64)
    assert machine.kernel == "_add"
    assert machine.options["BLOCK"] == 4096


def test_loads_are_wide_only_where_lengths_are_multiples(cache: Path) -> None:
    assert _added("sm_90", cache, n=4096).count(r"LDG\.E\.128") == 8
    assert _added("sm_90", cache, n=4095).count(r"LDG\.E\.128") == 0


@pytest.mark.parametrize("target", TARGETS)
def test_float_atomics_are_seen(target: str, cache: Path) -> None:
    machine = _added(target, cache, atomic=True)
    assert machine.float_atomics > 0
    with pytest.raises(AssertionError):
        machine.check()


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target: str, cache: Path) -> None:
    # 1024 values a thread, all of them loaded before the first is stored
    machine = _added(target, cache, block=128 * 1024)
    assert machine.spilled > 0 or machine.registers > 255
    with pytest.raises(AssertionError):
        machine.check()


@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma_")])
def test_tensor_cores_are_seen(target: str, instruction: str, cache: Path) -> None:
    a = torch.empty(64, 64, device="meta", dtype=torch.bfloat16)
    with compiling(target, cache) as machines:
        _product[(1,)](a, a, a, BLOCK=64, PRECISION="ieee", num_warps=4, enable_fp_fusion=True)
    assert machines[0].count(instruction) > 0


def test_products_in_full_precision_use_no_tensor_core(cache: Path) -> None:
    a = torch.empty(64, 64, device="meta")
    with compiling("sm_90", cache) as machines:
        _product[(1,)](a, a, a, BLOCK=64, PRECISION="ieee", num_warps=4, enable_fp_fusion=True)
    assert machines[0].count("HGMMA|HMMA") == 0
