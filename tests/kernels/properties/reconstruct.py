"""What every implementation of ``reconstruct`` must do; run on a CPU, in the interpreter and on a GPU."""

import math
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels import RECONSTRUCT, Act, DropScratch, Norm, RowFloat, RowInt, SlotInt, reconstruct
from sae_steer_kernels.reconstruct.generate import generate
from tests.kernels.guards import Guards, poison
from tests.kernels.properties.providers import provider

ON = torch.tensor(True)


def run(call: dict[str, Any], name: str, *, guarded: bool = True) -> Tensor:
    """``base [T, D_out]`` by one implementation, with poison around and inside all that it may touch."""
    guards = Guards()
    step = dict(call)
    tokens, features, topk = call["y"].shape[0], call["enc"].shape[0], int(call["row_int"][0, RowInt.TOPK])
    base = torch.empty(call["y"].shape, device=call["y"].device)
    scratch = DropScratch.empty(tokens=tokens, features=features, topk=topk, device=base.device) if topk else None
    if guarded:
        rows = ("y", "read", "residual", "enc", "dec")
        step = {
            key: guards.copy(value, gap=3 * (key in rows)) if isinstance(value, Tensor) else value
            for key, value in call.items()
        }
        base = guards.copy(base, gap=5)
    poison(base)
    for t in scratch.all if scratch is not None else ():
        poison(t)
    with provider(RECONSTRUCT, name):
        reconstruct(active=ON, base=base, scratch=scratch, **step)
    guards.check()
    return base


def wrong_tokens(call: dict[str, Any], base: Tensor) -> list[int]:
    """Tokens whose result is not the definition's."""
    host = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in call.items()}
    exact, got = RECONSTRUCT.reference(**host), base.cpu().double()
    x = host["y"] if host["read"] is None else host["read"]
    size = 1 + x.double().norm(dim=1) + host["y"].double().norm(dim=1)
    if host["residual"] is not None:
        size = size + host["residual"].double().norm(dim=1)
    near = (got - exact).norm(dim=1) <= RECONSTRUCT.tolerances[base.dtype] * size
    right = torch.where(exact[:, 0].isnan(), got.isnan().all(dim=1), near)
    return (~right).nonzero().squeeze(1).tolist()


def _cases(device: torch.device, act: Act) -> list[dict[str, Any]]:
    shapes = [
        {"tokens": 1, "width": 7, "features": 5, "topk": 2},
        {"tokens": 17, "width": 33, "features": 257, "topk": 20},
        {"tokens": 9, "width": 48, "features": 100, "topk": 4, "residual": True},
        {"tokens": 9, "width": 40, "features": 130, "topk": 4, "dtype": torch.bfloat16, "residual": True},
        {"tokens": 9, "width": 40, "features": 65, "topk": 4, "dtype": torch.float16, "width_out": 28},
        *({"norm": norm, "topk": 4} for norm in Norm),
    ]
    return [generate(seed, device, act=act, **shape) for seed, shape in enumerate(shapes)]


def check_topk_against_definition(name: str, device: torch.device) -> None:
    for number, call in enumerate(_cases(device, Act.TOPK)):
        assert not wrong_tokens(call, run(call, name)), number


def check_wrong_inputs_are_seen(name: str, device: torch.device) -> None:
    call = generate(2, device, tokens=8, topk=4, norm=Norm.LAYER_NORM)
    # each slot with one selector and with another
    call["slots"] = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4], dtype=torch.int32, device=device)
    call["bits"] = torch.tensor([1, 1, 2, 0, 2, 1, 2, 1], dtype=torch.int32, device=device)
    assert not wrong_tokens(call, run(call, name))
    scalars, members, centred = call["row_float"].clone(), call["row_int"].clone(), call["row_int"].clone()
    scalars[:, RowFloat.BIAS] += 1e-3
    members[:, RowInt.TOPK] -= 1
    centred[:, RowInt.NORM] = int(Norm.CENTER)
    others = call["slot_int"].clone()
    others[1, SlotInt.DROP_SELECT] = 2
    wrong = {
        "another bias": {**call, "row_float": scalars},
        "one feature fewer": {**call, "row_int": members},
        "another normalisation": {**call, "row_int": centred},
        "no decoder bias": {**call, "dec_bias": torch.zeros_like(call["dec_bias"])},
        "another selector": {**call, "slot_int": others},
        "another dictionary": {**call, "sae": 1},
    }
    for what, changed in wrong.items():
        assert wrong_tokens(call, run(changed, name)), what


def check_idle(name: str, device: torch.device) -> None:
    call = generate(7, device)
    call["slots"].zero_()
    assert run(call, name).isnan().all()
    empty = {**call, **{key: call[key][:0] for key in ("y", "slots", "bits")}}
    assert run(empty, name, guarded=False).shape == (0, 24)


def check_poisoned_tokens_stay_alone(name: str, device: torch.device) -> None:
    call = generate(11, device, tokens=16, topk=4)
    base = run(call, name)
    victim, *others = (~base[:, 0].isnan()).nonzero().squeeze(1).tolist()
    assert others
    y = call["y"].clone()
    y[victim] = math.nan
    assert torch.equal(run({**call, "y": y}, name)[others], base[others])
