"""``feature_edit`` on a GPU: what the interpreter checks, and what it cannot."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from sae_steer_kernels import FEATURE_EDIT, EditBuffers, EditTable, RowFloat, RowInt, SlotInt, feature_edit
from sae_steer_kernels.feature_edit import scratch_floats
from sae_steer_kernels.feature_edit.generate import generate
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.regimes import Regime
from tests.kernels.cases import Step, error, make_step, reference
from tests.kernels.properties import feature_edit as properties

CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_") and name != "check_wrong"]
CUDA = torch.device("cuda")
WAYS = ["torch", *properties.KERNELS]
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check: Any, way: str, gpu: torch.device) -> None:
    check(way, gpu)


@pytest.mark.parametrize("way", properties.KERNELS)
@pytest.mark.parametrize("wrong", properties.WRONG)
def test_what_is_forgotten_is_seen(wrong: str, way: str, gpu: torch.device) -> None:
    properties.check_wrong(way, gpu, wrong)


@ways
@settings(max_examples=60)
@given(step=properties.steps)
def test_equals_the_definition(way: str, step: Step) -> None:
    assert not properties.disagreement(step.to(CUDA), way)


@pytest.mark.parametrize("way", properties.KERNELS)
@pytest.mark.parametrize("sizes", properties.REAL_SIZES, ids=properties.name_of)
def test_equals_the_definition_in_real_sizes(way: str, sizes: Any, gpu: torch.device) -> None:
    assert not properties.disagreement(make_step(7, **sizes).to(gpu), way)


def _edit(call: dict[str, Any]) -> None:
    feature_edit(**call)


@pytest.mark.parametrize("tokens", [8, 100, 600])
def test_a_graph_follows_its_tables(tokens: int, gpu: torch.device, no_sync: Any) -> None:
    """Captured while nothing is steered; each replay edits as the tables, slots and groups then say."""
    sizes = {"tokens": tokens, "width": 256, "rows": 16, "slots": 3, "dtype": torch.bfloat16}
    call = generate(1, gpu, **sizes)
    call["active"] = torch.tensor(False)
    held = call["slots"].clone()
    call["slots"].zero_()
    call["groups"].fill(call["slots"], 4)
    original = call["y"].clone()
    _edit(call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _edit(call)
    graph.replay()
    assert torch.equal(call["y"], original)
    for seed in (1, 2):
        other = generate(seed, gpu, **sizes)
        for mine, theirs in zip(call["table"].tensors, other["table"].tensors, strict=True):
            mine.copy_(theirs)
        call["slots"].copy_(held.roll(seed))
        call["y"].copy_(original)
        with no_sync():
            call["groups"].fill(call["slots"], 4)
            graph.replay()
        step = Step(other["table"], original, call["slots"], call["bits"])
        assert not properties.difference(step, call["y"], call["buffers"], within=1e-4)
    assert not torch.equal(call["y"], original)


@pytest.mark.parametrize("tokens", [8, 100, 600])
def test_nothing_waits_for_the_device(tokens: int, gpu: torch.device, no_sync: Any) -> None:
    call = generate(3, gpu, tokens=tokens, width=256, rows=16, slots=3)
    _edit(call)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_sync():
        _edit(call)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_bits_do_not_depend_on_the_batch(gpu: torch.device) -> None:
    call = generate(5, gpu, tokens=600, width=512, rows=32, slots=3, dtype=torch.bfloat16)
    original = call["y"].clone()
    results = []
    for tokens in (600, 100, 8):
        part = {name: value[:tokens] if name in ("y", "slots", "bits") else value for name, value in call.items()}
        part |= {"y": original[:tokens].clone(), "buffers": call["buffers"].first(tokens), "groups": None}
        feature_edit(**part, batch_invariant=True)
        results.append(part["y"][:8])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_offsets_beyond_two_to_the_31(gpu: torch.device) -> None:
    tokens, width = 2**19 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GiB of GPU memory are free")
    small = make_step(9, tokens=8, width=width, rows=16, slots=2, dtype=torch.bfloat16)
    y = torch.zeros(tokens, width, dtype=torch.bfloat16, device=gpu)
    slots, bits = (torch.zeros(tokens, dtype=torch.int32, device=gpu) for _ in range(2))
    y[-8:], slots[-8:], bits[-8:] = small.y.to(gpu), small.slots.to(gpu), small.bits.to(gpu)
    buffers = EditBuffers.empty(tokens=tokens, rows=16, device=gpu, scratch=scratch_floats(tokens, 16, width, width))
    groups = TokenGroups.empty(tokens=tokens, slots=3, device=gpu).fill(slots, 3)
    expected, *_ = reference(small)
    for own in (None, groups):
        y[-8:] = small.y.to(gpu)
        feature_edit(y, slots, bits, torch.tensor(True), small.table.to(gpu), buffers, groups=own)
        assert error(y[-8:], expected) <= FEATURE_EDIT.tolerances[torch.bfloat16]
    assert not y[:-8].any()


def test_a_table_beyond_two_to_the_31(gpu: torch.device) -> None:
    slots, rows, width = 40, 8192, 8192
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory are free")
    table = EditTable.empty(slots=slots, rows=rows, width=width, width_out=width, dtype=torch.bfloat16, device=gpu)
    table.enc[slots, rows - 1, 0] = table.dec[slots, rows - 1, 1] = 1.0
    table.row_float[slots, rows - 1, RowFloat.SHIFT] = 5.0
    table.row_int[slots, :, RowInt.SELECT] = 1
    table.slot_int[slots, SlotInt.ROWS] = rows
    for way in Regime:
        y = torch.zeros(8, width, dtype=torch.bfloat16, device=gpu)
        mine = torch.full((8,), slots, dtype=torch.int32, device=gpu)
        out, _ = properties.run(Step(table, y, mine, torch.ones_like(mine)), way.value, guarded=False)
        assert out[:, 1].tolist() == [5.0] * 8, way


@pytest.mark.parametrize("tokens", [8, 600])
def test_compiles_into_a_full_graph(tokens: int, gpu: torch.device) -> None:
    call = generate(4, gpu, tokens=tokens, width=256, rows=16, slots=3)

    def forward(y: torch.Tensor) -> torch.Tensor:
        y = y * 2
        feature_edit(**{**call, "y": y})
        return y + 1

    compiled = torch.compile(forward, fullgraph=True)
    torch.testing.assert_close(compiled(call["y"]), forward(call["y"]))


def test_opcheck(gpu: torch.device) -> None:
    call = generate(4, gpu, tokens=40, width=64, rows=9, slots=3)
    buffers, extras = call["buffers"], (call["read"], call["residual"], call["base"], call["rank"])
    outputs = (buffers.before, buffers.after, buffers.dose, buffers.flags)
    arguments = (call["y"], call["slots"], call["bits"], call["active"], *call["table"].tensors, *outputs, *extras)
    torch.library.opcheck(FEATURE_EDIT.overload, arguments)


def test_the_default_is_triton(gpu: torch.device) -> None:
    assert FEATURE_EDIT.provider(gpu) == "triton"
