"""``topk_readout`` on a CPU, and as torch sees it."""

import pytest
import torch

from sae_steer_kernels import TOPK_READOUT, ReadoutBuffers, topk_readout
from sae_steer_kernels.topk_readout.generate import generate
from tests.kernels.properties import topk_readout as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]
FLAGS = [torch.tensor(True), torch.tensor(False)]


@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check, name: str) -> None:
    check(name, CPU)


def test_a_cpu_takes_what_is_compiled() -> None:
    assert TOPK_READOUT.provider(CPU) == "numba"  # it comes with what the tests need


@pytest.mark.parametrize("active", FLAGS, ids=["active", "idle"])
def test_schema_and_fake(active: torch.Tensor) -> None:
    call = generate(1, CPU)
    whole = (call["enc"], call["row_float"], call["row_int"])
    buffers = ReadoutBuffers.empty(tokens=5, features=150, k=4, device=CPU)
    torch.library.opcheck(TOPK_READOUT.overload, (call["x"], call["wanted"], active, *whole, *buffers.all))


def test_compiled_in_one_graph() -> None:
    call = generate(4, CPU, tokens=12)

    def step(active: torch.Tensor, buffers: ReadoutBuffers) -> tuple[torch.Tensor, torch.Tensor]:
        topk_readout(active=active, buffers=buffers, **call)
        return buffers.ids + 0, buffers.values + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for active in FLAGS:
        eager, graph = (ReadoutBuffers.empty(tokens=12, features=150, k=4, device=CPU) for _ in range(2))
        for got, expected in zip(compiled(active, graph), step(active, eager), strict=True):
            assert torch.equal(got, expected)
        assert bool(graph.ids.ge(0).any()) == bool(active)  # the flag is read in each call, and not baked in
