"""What is known of a call of ``feature_edit`` before it runs: regime, scratch, groups, implementation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_steer_kernels import FEATURE_EDIT, feature_edit
from sae_steer_kernels._op import Op
from sae_steer_kernels.feature_edit.generate import generate
from sae_steer_kernels.feature_edit.grouping import TILE, TokenGroups, tile_count
from sae_steer_kernels.feature_edit.regimes import Regime, choose, grouped_floats, scratch_floats, two_phase_floats

CPU = torch.device("cpu")


@given(tokens=st.integers(0, 5000), rows=st.integers(1, 5000), wide=st.sampled_from([64, 2304, 8192]))
def test_scratch_is_enough_for_the_regime_that_is_chosen(tokens: int, rows: int, wide: int) -> None:
    have = scratch_floats(5000, rows, wide, wide)
    regime = choose(tokens, rows, scratch=have > 0, grouped=True, batch_invariant=False)
    if regime is Regime.TWO_PHASE:
        assert have >= two_phase_floats(tokens, wide)
    elif regime is Regime.GROUPED:
        assert have >= grouped_floats(tokens, rows, wide, wide)


@given(tokens=st.integers(0, 5000), rows=st.integers(1, 5000), scratch=st.booleans(), grouped=st.booleans())
def test_one_regime_serves_all_where_bits_may_not_depend_on_the_batch(
    tokens: int, rows: int, scratch: bool, grouped: bool
) -> None:
    assert choose(tokens, rows, scratch=scratch, grouped=grouped, batch_invariant=True) is Regime.ROW


def test_each_regime_is_chosen_somewhere() -> None:
    chosen = {
        choose(tokens, 64, scratch=True, grouped=True, batch_invariant=False) for tokens in (1, 32, 33, 256, 257, 2048)
    }
    assert chosen == set(Regime)


@given(slots=st.lists(st.integers(0, 4), max_size=300), capacity=st.integers(300, 400))
def test_groups_hold_every_token_once_with_its_slot(slots: list[int], capacity: int) -> None:
    buffers = TokenGroups.empty(tokens=capacity, slots=5, device=CPU)
    buffers.fill(torch.arange(capacity, dtype=torch.int32) % 5, 5)  # what an earlier step left
    groups = buffers.fill(torch.tensor(slots, dtype=torch.int32), 5)
    assert groups.tiles.shape[0] == tile_count(len(slots), 5)
    assert not buffers.tiles[groups.tiles.shape[0] :].any()
    seen = []
    for slot, start, end in groups.tiles.tolist():
        assert 0 <= end - start <= TILE
        for token in groups.order[start:end].tolist():
            assert slots[token] == slot
            seen.append(token)
    assert sorted(seen) == list(range(len(slots)))


def test_bits_do_not_depend_on_the_batch_in_torch() -> None:
    call = generate(3, CPU, tokens=9, width=33, rows=5, slots=2)
    original = call["y"].clone()
    feature_edit(**call, batch_invariant=True)
    alone = original[4:5].clone()
    own = {name: call[name][4:5] for name in ("slots", "bits")}
    buffers = call["buffers"].first(1)
    feature_edit(alone, active=call["active"], table=call["table"], buffers=buffers, batch_invariant=True, **own)
    assert torch.equal(alone, call["y"][4:5])


def _op(obstacle: str) -> Op:
    return Op(
        name="nothing",
        reference=lambda: None,
        implementations={"torch": lambda x: None, "triton": lambda x: None},
        by_device={"cpu": "triton"},
        tolerances={},
        supports={"triton": lambda x: obstacle},
    )


def test_a_call_that_the_default_cannot_take_falls_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert _op("").provider(CPU, x) == "triton"
    assert _op("it is too wide").provider(CPU, x) == "torch"
    monkeypatch.setenv("SAE_STEER_NOTHING", "triton")
    with pytest.raises(LookupError, match="it is too wide"):
        _op("it is too wide").provider(CPU, x)


def test_the_schema_says_what_is_written() -> None:
    for name in ("y", "before", "after", "dose", "flags"):
        assert f"!) {name}" in FEATURE_EDIT.schema
    assert "!) enc" not in FEATURE_EDIT.schema


def test_a_machine_without_triton_edits(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from sae_steer_kernels import FEATURE_EDIT, feature_edit
from sae_steer_kernels.feature_edit.generate import generate
call = generate(1, torch.device("cpu"))
before = call["y"].clone()
feature_edit(**call)
assert not torch.equal(call["y"], before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_call_on_a_cpu_imports_no_kernel(tmp_path: Path) -> None:
    program = """
import sys
import torch
from sae_steer_kernels import feature_edit
from sae_steer_kernels.feature_edit.generate import generate
feature_edit(**generate(1, torch.device("cpu")))
assert not [name for name in sys.modules if name.startswith("sae_steer_kernels") and "triton" in name]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_device_has_its_default() -> None:
    assert FEATURE_EDIT.by_device == {"cpu": "numba", "cuda": "triton"}  # numba comes with what the tests need
    assert FEATURE_EDIT.provider(CPU) == "numba"
