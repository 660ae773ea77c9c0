"""What every implementation of ``topk_readout`` must do; run on a CPU, in the interpreter and on a GPU."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels import TOPK_READOUT, Act, Norm, ReadoutBuffers, RowFloat, RowInt, topk_readout
from sae_steer_kernels.topk_readout.generate import generate
from sae_steer_kernels.topk_readout.reference import topk_readout_reference
from tests.kernels.guards import POISON, Guards, poison
from tests.kernels.properties.providers import provider

ON = torch.tensor(True)


def run(call: dict[str, Any], k: int, name: str, *, guarded: bool = True) -> tuple[Tensor, Tensor]:
    """``ids`` and ``values`` ``[T, k]`` by one implementation, with poison around and inside all that it may touch."""
    guards = Guards()
    step = dict(call)
    tokens, features = call["x"].shape[0], call["enc"].shape[0]
    buffers = ReadoutBuffers.empty(tokens=tokens, features=features, k=k, device=call["x"].device)
    if guarded:
        for key in ("enc", "row_float", "row_int", "wanted"):
            step[key] = guards.copy(call[key])
        for key in ("x", "residual"):
            step[key] = None if call[key] is None else guards.copy(call[key], gap=3)
        buffers = ReadoutBuffers(*(guards.copy(getattr(buffers, field.name)) for field in fields(buffers)))
    for buffer in buffers.all:
        poison(buffer)
    with provider(TOPK_READOUT, name):
        topk_readout(active=ON, buffers=buffers, **step)
    guards.check()
    return buffers.ids, buffers.values


def disagreements(call: dict[str, Any], k: int, ids: Tensor, values: Tensor) -> list[str]:
    """Where the result is not what the definition allows."""
    host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.items()}
    x = host["x"].double() + (0 if host["residual"] is None else host["residual"].double())
    features = host["enc"].shape[0]
    all_ids, all_f = topk_readout_reference(**host, k=features)
    largest = float(x.norm(dim=1).max()) * float(host["enc"].norm(dim=1).max())
    room = TOPK_READOUT.tolerances[call["x"].dtype] * (1 + 4 * largest)
    if int(host["row_int"][0, RowInt.NORM]) in (Norm.LAYER_NORM, Norm.NORM_RESCALE):
        room /= min(1.0, float(x.std(dim=1).min()), float(x.norm(dim=1).min()) / math.sqrt(x.shape[1]))
    wrong = []
    for t in range(x.shape[0]):
        got, f = ids[t].cpu(), values[t].cpu().double()
        if int(host["wanted"][t]) == 0:
            if not (got == POISON[torch.int32]).all() or not f.isnan().all():
                wrong.append(f"token {t}: written, and is not wanted")
            continue
        exact = torch.zeros(features, dtype=torch.float64)
        held = all_ids[t] >= 0
        exact[all_ids[t][held].long()] = all_f[t][held]
        ordered = exact.sort(descending=True).values
        count = int((got >= 0).sum())
        if not (got[:count] >= 0).all() or not (got[count:] == -1).all() or not (f[count:] == 0).all():
            wrong.append(f"token {t}: not -1 and 0 after the last feature")
            continue
        if got[:count].unique().numel() != count or (got >= features).any():
            wrong.append(f"token {t}: a feature twice, or none of the dictionary's")
            continue
        if not (f[:count].diff() <= 0).all():
            wrong.append(f"token {t}: not in order")
        if not ((exact[got[:count].long()] - f[:count]).abs() <= room).all():
            wrong.append(f"token {t}: a feature with another's value")
        expected = torch.zeros(k, dtype=torch.float64)
        expected[: min(k, features)] = ordered[:k]
        if not ((expected - f).abs() <= room).all():
            wrong.append(f"token {t}: not the largest")
    return wrong


def cases(device: torch.device) -> list[tuple[dict[str, Any], int]]:
    """Calls of all shapes, dtypes, activations and normalisations, and how many features they ask for."""
    calls = [
        ({"tokens": 1, "width": 7, "features": 5}, 3),
        ({"tokens": 2, "width": 9, "features": 20}, 31),  # more than there are
        ({"tokens": 17, "width": 33, "features": 257}, 5),
        ({"tokens": 33, "width": 48, "features": 300, "residual": True}, 3),
        ({"tokens": 110, "width": 24, "features": 140}, 4),  # the compiled loop leaves so many products to torch
        ({"tokens": 3, "width": 40, "features": 130, "dtype": torch.bfloat16}, 17),
        ({"tokens": 3, "width": 40, "features": 130, "dtype": torch.float16, "residual": True}, 7),
        ({"act": Act.TOPK, "topk": 4}, 6),
        ({"act": Act.TOPK, "topk": 30}, 6),
        *(({"act": act}, 4) for act in (Act.JUMPRELU, Act.GATED, Act.TANH_RELU)),
        *(({"norm": norm}, 4) for norm in Norm),
    ]
    return [(generate(seed, device, **shape), k) for seed, (shape, k) in enumerate(calls)]


def check_against_definition(name: str, device: torch.device) -> None:
    for number, (call, k) in enumerate(cases(device)):
        wrong = disagreements(call, k, *run(call, k, name))
        assert not wrong, (number, wrong)


def check_wrong_inputs_are_seen(name: str, device: torch.device) -> None:
    """The same check must fail where the op is given anything else than what the definition is given."""
    call = generate(2, device, tokens=4, features=200, act=Act.JUMPRELU, norm=Norm.LAYER_NORM)
    assert not disagreements(call, 5, *run(call, 5, name))
    relu, centred, scalars = call["row_int"].clone(), call["row_int"].clone(), call["row_float"].clone()
    relu[:, RowInt.ACT] = int(Act.TANH_RELU)
    centred[:, RowInt.NORM] = int(Norm.CENTER)
    scalars[:, RowFloat.BIAS] += 1e-3
    wrong = {
        "another activation": {**call, "row_int": relu},
        "another normalisation": {**call, "row_int": centred},
        "another bias": {**call, "row_float": scalars},
        "a dictionary in another order": {
            **call, **{part: call[part].roll(1, dims=0) for part in ("enc", "row_float", "row_int")}
        },
        "other tokens": {**call, "wanted": 1 - call["wanted"]},
    }  # fmt: skip
    for what, changed in wrong.items():
        assert disagreements(call, 5, *run(changed, 5, name)), what
    ids, values = run(call, 5, name)
    assert disagreements(call, 5, ids.roll(1, dims=1), values), "another order"
    fewer = run(call, 4, name)
    padded = [torch.nn.functional.pad(fewer[0], (0, 1), value=-1), torch.nn.functional.pad(fewer[1], (0, 1))]
    assert disagreements(call, 5, *padded), "one too few"


def check_order_does_not_matter(name: str, device: torch.device) -> None:
    """A token's result is the same to the bit wherever it stands, and in whatever company."""
    call = generate(5, device, tokens=18, features=170)
    call["wanted"].fill_(1)
    ids, values = run(call, 4, name)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0)).to(device)
    moved_ids, moved_values = run({**call, "x": call["x"][order]}, 4, name)
    assert torch.equal(moved_ids, ids[order])
    alone_ids, alone_values = run({**call, "x": call["x"][3:4], "wanted": call["wanted"][3:4]}, 4, name)
    assert torch.equal(alone_ids, ids[3:4])
    if name != "torch":  # torch's matrix product sums in another order for another number of tokens
        assert torch.equal(moved_values, values[order])
        assert torch.equal(alone_values, values[3:4])


def check_ties_go_to_the_lower_number(name: str, device: torch.device) -> None:
    call = generate(1, device, tokens=3, features=170)
    call["wanted"].fill_(1)
    for first, last in ((40, 44), (100, 103)):  # in groups of their own, and seven are too many for five
        for part in ("enc", "row_float"):
            call[part][first:last] = call[part][40].clone()
        call["row_float"][first:last, RowFloat.BIAS] = 50.0
    ids, _ = run(call, 5, name)
    assert torch.equal(ids, torch.tensor([[40, 41, 42, 43, 100]], device=device, dtype=torch.int32).expand(3, 5))
    call["row_int"][:, RowInt.ACT], call["row_int"][:, RowInt.TOPK] = int(Act.TOPK), 2
    assert torch.equal(run(call, 5, name)[0], ids)  # ties at the edge of a TopK dictionary are members


def check_nothing_active(name: str, device: torch.device) -> None:
    call = generate(3, device)
    call["row_float"][:, RowFloat.BIAS] = -100.0
    call["wanted"].fill_(1)
    ids, values = run(call, 4, name)
    assert (ids == -1).all()
    assert (values == 0).all()


def check_idle(name: str, device: torch.device) -> None:
    call = generate(7, device)
    call["wanted"].zero_()
    ids, values = run(call, 4, name)
    assert (ids == POISON[torch.int32]).all()
    assert values.isnan().all()
    empty = {**call, "x": call["x"][:0], "wanted": call["wanted"][:0]}
    assert run(empty, 4, name, guarded=False)[0].shape == (0, 4)


def check_poisoned_tokens_stay_alone(name: str, device: torch.device) -> None:
    call = generate(11, device, tokens=7)
    call["wanted"].fill_(1)
    ids, values = run(call, 6, name)
    keep = torch.arange(7, device=device) != 4
    for value in (math.nan, math.inf):
        x = call["x"].clone()
        x[4] = value
        poisoned_ids, poisoned_values = run({**call, "x": x}, 6, name)
        assert torch.equal(poisoned_ids[keep], ids[keep])
        torch.testing.assert_close(poisoned_values[keep], values[keep])
