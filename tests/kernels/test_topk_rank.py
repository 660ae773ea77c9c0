"""``topk_rank`` on a CPU, and as torch sees it."""

import pytest
import torch

from sae_steer_kernels import TOPK_RANK, RankBuffers, topk_rank
from sae_steer_kernels.topk_rank.generate import generate
from tests.kernels.properties import topk_rank as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]
FLAGS = [torch.tensor(True), torch.tensor(False)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("torch", CPU)


def _arguments(active: torch.Tensor) -> tuple[object, ...]:
    call = generate(1, CPU)
    table, buffers = call["table"], RankBuffers.empty(tokens=5, rows=3, device=CPU)
    tables = (table.enc, table.row_float, table.row_int, table.slot_int)
    whole = (call["sae"], call["enc"], call["row_float"], call["row_int"])
    return (
        call["y"], call["slots"], active, *tables, *whole,
        buffers.rank, buffers.moments, buffers.own, buffers.which, buffers.todo,
    )  # fmt: skip


@pytest.mark.parametrize("active", FLAGS, ids=["active", "idle"])
def test_schema_and_fake(active: torch.Tensor) -> None:
    torch.library.opcheck(TOPK_RANK.overload, _arguments(active))


def test_compiled_in_one_graph() -> None:
    call = generate(4, CPU, tokens=12)

    def step(active: torch.Tensor, buffers: RankBuffers) -> torch.Tensor:
        topk_rank(active=active, buffers=buffers, **call)
        return buffers.rank + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for active in FLAGS:
        eager, graph = (RankBuffers.empty(tokens=12, rows=3, device=CPU) for _ in range(2))
        assert torch.equal(compiled(active, graph), step(active, eager))
        assert bool(graph.rank.any()) == bool(active)  # the flag is read in each call, and not baked in


def test_reference_counts() -> None:
    call = generate(6, CPU, tokens=4)
    table = call["table"]
    tables = (table.enc, table.row_float, table.row_int, table.slot_int)
    rank = TOPK_RANK.reference(call["y"], call["slots"], *tables, 0, call["enc"], call["row_float"], call["row_int"])
    got = properties.run(call, "torch")
    assert torch.equal(rank[rank >= 0], got[rank >= 0])
    assert bool((rank >= 0).any())


def test_override_names_no_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOPK_RANK.variable, "metal")
    with pytest.raises(LookupError, match="SAE_STEER_TOPK_RANK takes: torch, triton"):
        topk_rank(active=FLAGS[0], buffers=RankBuffers.empty(tokens=5, rows=3, device=CPU), **generate(1, CPU))
