"""What every implementation of ``topk_rank`` must do; run on a CPU, in the interpreter and on a GPU."""

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels import TOPK_RANK, EditTable, Norm, RankBuffers, RowFloat, RowInt, SlotInt, topk_rank
from sae_steer_kernels.topk_rank.generate import generate
from tests.kernels.guards import POISON, Guards, poison
from tests.kernels.properties.providers import provider

ON = torch.tensor(True)
NOT_RANKED = POISON[torch.int32]


def run(call: dict[str, Any], name: str, *, guarded: bool = True) -> Tensor:
    """``rank [T, K]`` of a call by one implementation, with poison around and inside everything it may touch."""
    guards = Guards()
    step = dict(call)
    tokens, rows = call["y"].shape[0], call["table"].enc.shape[1]
    buffers = RankBuffers.empty(tokens=tokens, rows=rows, device=call["y"].device)
    if guarded:
        for key in ("enc", "row_float", "row_int", "slots"):
            step[key] = guards.copy(call[key])
        for key in ("y", "read", "residual"):
            step[key] = None if call[key] is None else guards.copy(call[key], gap=3)
        table = call["table"]
        step["table"] = EditTable(*(guards.copy(getattr(table, field.name)) for field in fields(table)))
        buffers = RankBuffers(*(guards.copy(getattr(buffers, field.name)) for field in fields(buffers)))
    for field in fields(buffers):
        poison(getattr(buffers, field.name))
    with provider(TOPK_RANK, name):
        topk_rank(active=ON, buffers=buffers, **step)
    guards.check()
    for key in ("y", "enc", "slots"):
        torch.testing.assert_close(step[key], call[key], rtol=0, atol=0, equal_nan=True)
    return buffers.rank


def _preactivations(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``[T, F]`` float64 pre-activations, and how far rounding may move each."""
    x = (call["y"] if call["read"] is None else call["read"]).double()
    if call["residual"] is not None:
        x = x + call["residual"].double()
    mean, std, length = x.mean(1, keepdim=True), x.std(1, keepdim=True), x.norm(dim=1, keepdim=True)
    factor = {
        Norm.NONE: torch.ones_like(mean),
        Norm.CENTER: torch.ones_like(mean),
        Norm.LAYER_NORM: 1 / (std + 1e-5),
        Norm.NORM_RESCALE: math.sqrt(x.shape[1]) / length,
    }[Norm(int(call["row_int"][0, RowInt.NORM]))]
    centred = int(call["row_int"][0, RowInt.NORM]) in (Norm.CENTER, Norm.LAYER_NORM)
    enc, scalars = call["enc"].double(), call["row_float"].double()
    shift = mean * scalars[:, RowFloat.ENC_SUM] if centred else torch.zeros_like(mean)
    pre = (x @ enc.T - shift) * factor + scalars[:, RowFloat.BIAS]
    size = (length * enc.norm(dim=1) + shift.abs()) * factor.abs() + scalars[:, RowFloat.BIAS].abs()
    return pre, size * TOPK_RANK.tolerances[call["y"].dtype]


def disagreements(call: dict[str, Any], rank: Tensor) -> list[str]:
    """Where ``rank`` is not what the definition allows, and how often the definition itself hangs on rounding."""
    pre, room = _preactivations(call)
    table, k, wrong, close, pairs = call["table"], int(call["row_int"][0, RowInt.TOPK]), [], 0, 0
    for t, s in enumerate(call["slots"].tolist()):
        for i in range(rank.shape[1]):
            ints, got = table.row_int[s, i], int(rank[t, i])
            in_use = s > 0 and i < int(table.slot_int[s, SlotInt.ROWS])
            if not in_use or int(ints[RowInt.TOPK]) == 0 or int(ints[RowInt.SAE]) != call["sae"]:
                if got != NOT_RANKED:
                    wrong.append(f"token {t}, row {i}: written, and is not to be ranked")
                continue
            feature = int(ints[RowInt.FEATURE])
            own, error = pre[t, feature], room[t] + room[t, feature]
            others = torch.arange(pre.shape[1], device=pre.device) != feature
            least = int(((pre[t] > own + error) & others).sum())
            most = int(((pre[t] > own - error) & others).sum())
            pairs += 1
            if got < 0:
                wrong.append(f"token {t}, row {i}: not written")
            elif own <= room[t, feature]:
                continue  # inactive whatever its rank, or too near to zero to say
            elif got < k and not least <= got <= most:
                wrong.append(f"token {t}, row {i}: {got}, and from {least} to {most} are larger")
            elif got >= k > most:
                wrong.append(f"token {t}, row {i}: not a member, and {most} are larger")
            close += least < k <= most
    assert close <= 0.01 * pairs + 1, "too many cases hang on rounding for the check to mean anything"
    return wrong


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Calls of all shapes, dtypes and normalisations."""
    shapes = [
        {"tokens": 1, "width": 7, "features": 5, "rows": 1, "slots": 1, "k": 2},
        {"tokens": 17, "width": 33, "features": 129, "rows": 5, "slots": 4, "k": 20},
        {"tokens": 33, "width": 48, "features": 200, "rows": 9, "slots": 2, "k": 31, "residual": True},
        {"tokens": 6, "width": 64, "features": 64, "rows": 3, "k": 8, "dtype": torch.bfloat16},
        {"tokens": 6, "width": 40, "features": 130, "rows": 3, "k": 8, "dtype": torch.bfloat16, "residual": True},
        {"tokens": 6, "width": 64, "features": 65, "rows": 2, "k": 8, "dtype": torch.float16, "width_out": 24},
        *({"tokens": 9, "norm": norm} for norm in Norm),
    ]
    return [generate(seed, device, **shape) for seed, shape in enumerate(shapes)]


def check_against_definition(name: str, device: torch.device) -> None:
    for number, call in enumerate(cases(device)):
        wrong = disagreements(call, run(call, name))
        assert not wrong, (number, wrong)


def check_wrong_inputs_are_seen(name: str, device: torch.device) -> None:
    """The same check must fail where the op is given anything else than what the definition is given."""

    def normalised(call: dict[str, Any], norm: Norm) -> dict[str, Any]:
        ints, table_ints = call["row_int"].clone(), call["table"].row_int.clone()
        ints[..., RowInt.NORM] = table_ints[..., RowInt.NORM] = int(norm)
        return {**call, "row_int": ints, "table": replace(call["table"], row_int=table_ints)}

    def narrower(call: dict[str, Any]) -> dict[str, Any]:
        table = call["table"]
        return {
            **call,
            "y": call["y"][:, :-1],
            "enc": call["enc"][:, :-1],
            "table": replace(table, enc=table.enc[..., :-1].contiguous()),
        }

    call = generate(4, device, tokens=40, features=200, rows=6, slots=6, k=80, norm=Norm.LAYER_NORM)
    assert not disagreements(call, run(call, name))
    scalars = call["row_float"].clone()
    scalars[:, RowFloat.BIAS] += 0.2 * torch.arange(200, device=device) / 200
    wrong = {
        "another normalisation": normalised(call, Norm.NONE),
        "a token without its last element": narrower(call),
        "another bias": {**call, "row_float": scalars},
        "a dictionary without its last features": {
            **call,
            **{part: call[part][:-9] for part in ("enc", "row_float", "row_int")},
        },
        "another dictionary": {**call, "sae": 1},
    }
    for what, changed in wrong.items():
        assert disagreements(call, run(changed, name)), what


def check_order_does_not_matter(name: str, device: torch.device) -> None:
    """Of tokens among themselves, and of slots."""
    call = generate(5, device, tokens=21, rows=4, slots=5, features=150)
    rank = run(call, name)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).to(device)
    moved = run({**call, "y": call["y"][order], "slots": call["slots"][order]}, name)
    assert torch.equal(decided(call, moved), decided(call, rank)[order])
    alone = run({**call, "y": call["y"][3:4], "slots": call["slots"][3:4]}, name)
    assert torch.equal(decided(call, alone), decided(call, rank)[3:4])
    places = torch.tensor([0, 4, 2, 5, 1, 3], device=device)
    table = EditTable(*(getattr(call["table"], field.name)[places] for field in fields(call["table"])))
    renamed = {**call, "table": table, "slots": places.argsort()[call["slots"].long()].int()}
    assert torch.equal(decided(call, run(renamed, name)), decided(call, rank))


def decided(call: dict[str, Any], rank: Tensor) -> Tensor:
    """What may be relied on: counts below k, and k for all others."""
    return rank.clamp_max(int(call["row_int"][0, RowInt.TOPK]))


def check_ties_count_as_members(name: str, device: torch.device) -> None:
    call = generate(1, device, tokens=3, rows=4, slots=1, k=2)
    for part in ("enc", "row_float"):
        call[part][5:9] = call[part][5].clone()
    call["row_float"][5:9, RowFloat.BIAS] = 100.0  # four equal largest pre-activations, and k = 2
    table = call["table"]
    table.enc[1], table.row_float[1], table.row_int[1] = call["enc"][5:9], call["row_float"][5:9], call["row_int"][5:9]
    table.slot_int[1, SlotInt.ROWS] = 4
    call["slots"].fill_(1)
    assert (run(call, name) == 0).all()


def check_idle(name: str, device: torch.device) -> None:
    call = generate(7, device)
    call["slots"].zero_()
    assert (run(call, name) == NOT_RANKED).all()
    empty = {**call, "y": call["y"][:0], "slots": call["slots"][:0]}
    assert run(empty, name, guarded=False).shape == (0, 3)


def check_poisoned_tokens_stay_alone(name: str, device: torch.device) -> None:
    call = generate(11, device, tokens=20, slots=2)
    rank = run(call, name)
    for value in (math.nan, math.inf):
        y = call["y"].clone()
        y[4] = value
        keep = torch.arange(20, device=device) != 4
        assert torch.equal(decided(call, run({**call, "y": y}, name))[keep], decided(call, rank)[keep])
