"""What every implementation of ``sparse_decode`` must do; run on a CPU, in the interpreter and on a GPU."""

import math
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels import SPARSE_DECODE, sparse_decode
from sae_steer_kernels.sparse_decode.generate import generate
from tests.kernels.guards import Guards, poison
from tests.kernels.properties.providers import provider

ON = torch.tensor(True)


def run(call: dict[str, Any], name: str, *, guarded: bool = True) -> Tensor:
    """``out [T, D_out]`` by one implementation, with poison around and inside all that it may touch."""
    guards = Guards()
    step = dict(call)
    out = torch.empty(call["ids"].shape[0], call["dec"].shape[1], device=call["ids"].device)
    if guarded:
        step = {
            key: None if value is None else guards.copy(value, gap=3 * (key == "dec")) for key, value in call.items()
        }
        out = guards.copy(out, gap=5)
    poison(out)
    with provider(SPARSE_DECODE, name):
        sparse_decode(active=ON, out=out, **step)
    guards.check()
    return out


def wrong_tokens(call: dict[str, Any], out: Tensor) -> list[int]:
    """Tokens whose result is not the definition's."""
    host = {key: None if value is None else value.cpu() for key, value in call.items()}
    exact, got = SPARSE_DECODE.reference(**host), out.cpu().double()
    wrong = []
    for t in range(exact.shape[0]):
        if int(host["wanted"][t]) == 0:
            right = bool(got[t].isnan().all())
        else:
            parts = host["values"][t][host["ids"][t] >= 0].abs().sum() * host["dec"].double().norm(dim=1).max() + 1
            right = float((got[t] - exact[t]).norm()) <= SPARSE_DECODE.tolerances[out.dtype] * float(parts)
        if not right:
            wrong.append(t)
    return wrong


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Calls of all shapes and dtypes."""
    shapes = [
        {"tokens": 1, "width": 1, "features": 1, "k": 1},
        {"tokens": 7, "width": 33, "k": 9},
        {"tokens": 3, "width": 700, "k": 17, "dtype": torch.bfloat16},
        {"tokens": 3, "width": 48, "k": 3, "dtype": torch.float16, "bias": False},
    ]
    return [generate(seed, device, **shape) for seed, shape in enumerate(shapes)]


def check_against_definition(name: str, device: torch.device) -> None:
    for number, call in enumerate(cases(device)):
        assert not wrong_tokens(call, run(call, name)), number


def check_wrong_inputs_are_seen(name: str, device: torch.device) -> None:
    call = generate(3, device, tokens=9)
    call["wanted"].fill_(1)
    call["wanted"][0] = 0
    wrong = {
        "the features of another place": {**call, "ids": call["ids"].roll(1, dims=1)},
        "no bias": {**call, "bias": None},
        "narrower rows": {**call, "dec": call["dec"].bfloat16()},
        "other tokens": {**call, "wanted": 1 - call["wanted"]},
        "one place too few": {**call, "ids": call["ids"].index_fill(1, torch.tensor([0], device=device), -1)},
    }
    assert not wrong_tokens(call, run(call, name))
    for what, changed in wrong.items():
        assert wrong_tokens(call, run(changed, name)), what


def check_tokens_stay_alone(name: str, device: torch.device) -> None:
    """To the bit: in any order, in any company, and beside a token that is not finite."""
    call = generate(5, device, tokens=12, width=70)
    call["wanted"].fill_(1)
    out = run(call, name)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(device)
    moved = run({**call, "ids": call["ids"][order], "values": call["values"][order]}, name)
    assert torch.equal(moved, out[order])
    values = call["values"].clone()
    values[4] = math.nan
    keep = torch.arange(12, device=device) != 4
    assert torch.equal(run({**call, "values": values}, name)[keep], out[keep])


def check_idle(name: str, device: torch.device) -> None:
    call = generate(7, device)
    call["wanted"].zero_()
    assert run(call, name).isnan().all()
    call["wanted"].fill_(1)
    call["ids"].fill_(-1)
    assert torch.equal(run(call, name), call["bias"].expand(5, -1))
    empty = {**call, **{key: call[key][:0] for key in ("ids", "values", "wanted")}}
    assert run(empty, name, guarded=False).shape == (0, 24)
