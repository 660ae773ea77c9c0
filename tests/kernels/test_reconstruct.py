"""``reconstruct`` on a CPU, and as torch sees it."""

import pytest
import torch

from sae_steer_kernels import RECONSTRUCT, Act, DropScratch, reconstruct
from sae_steer_kernels.reconstruct import torch_impl
from sae_steer_kernels.reconstruct.generate import generate
from tests.kernels.properties import reconstruct as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]
FLAGS = [torch.tensor(True), torch.tensor(False)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("torch", CPU)


@pytest.mark.parametrize("act", [act for act in Act if act not in (Act.IDENTITY, Act.TOPK)])
def test_other_dictionaries(act: Act) -> None:
    for call in properties._cases(CPU, act):
        assert not properties.wrong_tokens(call, properties.run(call, "torch"))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_both_ways_of_decoding(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "SPARSE", share)
    properties.check_topk_against_definition("torch", CPU)


def test_ties_are_members() -> None:
    call = generate(3, CPU, topk=2)
    for part in ("enc", "dec", "row_float"):
        call[part][5:9] = call[part][5].clone()
    call["row_float"][5:9, 0] = 50.0  # four equal largest pre-activations
    call["slots"].fill_(1)
    call["bits"].fill_(1)
    assert not properties.wrong_tokens(call, properties.run(call, "torch"))


@pytest.mark.parametrize("kept", [True, False], ids=["scratch", "no scratch"])
@pytest.mark.parametrize("active", FLAGS, ids=["active", "idle"])
def test_schema_and_fake(active: torch.Tensor, kept: bool) -> None:
    call = generate(1, CPU)
    scratch = DropScratch.empty(tokens=7, features=150, topk=9, device=CPU).all if kept else []
    whole = (call["enc"], call["dec"], call["dec_bias"], call["row_float"], call["row_int"])
    step = (call["y"], call["slots"], call["bits"], active, call["slot_int"], 0)
    torch.library.opcheck(RECONSTRUCT.overload, (*step, *whole, torch.zeros(7, 24), scratch))


def test_compiled_in_one_graph() -> None:
    call = generate(4, CPU)
    scratch = DropScratch.empty(tokens=7, features=150, topk=9, device=CPU)

    def step(active: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        reconstruct(active=active, base=base, scratch=scratch, **call)
        return base + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for active in FLAGS:
        assert torch.equal(compiled(active, torch.zeros(7, 24)), step(active, torch.zeros(7, 24)))
    assert bool(step(FLAGS[1], torch.zeros(7, 24)).eq(0).all())
