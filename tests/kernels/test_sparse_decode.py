"""``sparse_decode`` on a CPU, and as torch sees it."""

import pytest
import torch

from sae_steer_kernels import SPARSE_DECODE, sparse_decode
from sae_steer_kernels.sparse_decode.generate import generate
from tests.kernels.properties import sparse_decode as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]
FLAGS = [torch.tensor(True), torch.tensor(False)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("torch", CPU)


@pytest.mark.parametrize("active", FLAGS, ids=["active", "idle"])
def test_schema_and_fake(active: torch.Tensor) -> None:
    call = generate(1, CPU)
    arguments = (call["ids"], call["values"], call["wanted"], active, call["dec"], torch.zeros(5, 24), call["bias"])
    torch.library.opcheck(SPARSE_DECODE.overload, arguments)


def test_compiled_in_one_graph() -> None:
    call = generate(4, CPU)

    def step(active: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        sparse_decode(active=active, out=out, **call)
        return out + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for active in FLAGS:
        assert torch.equal(compiled(active, torch.zeros(5, 24)), step(active, torch.zeros(5, 24)))
    assert bool(step(FLAGS[1], torch.zeros(5, 24)).eq(0).all())
