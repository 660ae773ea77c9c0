"""When an op that a step may have no need of runs, and when it refuses to."""

import pytest
import torch

from sae_steer_kernels._call import call
from sae_steer_kernels._op import Op

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON, OFF = torch.tensor(True), torch.tensor(False)


def _op(ran: list[str]) -> Op:
    return Op(
        name="nothing",
        reference=lambda: None,
        implementations={"torch": lambda: ran.append("torch"), "triton": lambda: ran.append("triton")},
        by_device={"cpu": "torch", "cuda": "triton"},
        tolerances={},
        host_free=frozenset({"triton"}),
    )


@pytest.mark.parametrize(
    ("device", "active", "expected"),
    [(CPU, ON, ["torch"]), (CPU, OFF, []), (CUDA, ON, ["triton"]), (CUDA, OFF, ["triton"])],
)
def test_what_runs(
    device: torch.device, active: torch.Tensor, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ran: list[str] = []
    call(_op(ran), device, active, ())
    assert ran == expected


@pytest.mark.parametrize("active", [ON, OFF])
def test_a_graph_holds_only_what_replays(active: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ran: list[str] = []
    call(_op(ran), CUDA, active, ())
    assert ran == ["triton"]
    monkeypatch.setenv("SAE_STEER_NOTHING", "torch")
    with pytest.raises(RuntimeError, match="no CUDA graph can hold"):
        call(_op(ran), CUDA, active, ())
    assert ran == ["triton"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call(_op(ran), CUDA, OFF, ())
    assert ran == ["triton"]
