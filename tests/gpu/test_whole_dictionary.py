"""The ops over whole dictionaries on a GPU: what the interpreter checks, and what it cannot."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer_kernels import (
    Act,
    DropScratch,
    Norm,
    RankBuffers,
    ReadoutBuffers,
    reconstruct,
    sparse_decode,
    topk_rank,
    topk_readout,
)
from tests.kernels.properties import reconstruct as of_reconstruct
from tests.kernels.properties import sparse_decode as of_decode
from tests.kernels.properties import topk_rank as of_rank
from tests.kernels.properties import topk_readout as of_readout

MODULES = {"topk_rank": of_rank, "topk_readout": of_readout, "sparse_decode": of_decode, "reconstruct": of_reconstruct}
CHECKS = [
    pytest.param(check, id=f"{op}-{name.removeprefix('check_')}")
    for op, module in MODULES.items()
    for name, check in vars(module).items()
    if name.startswith("check_")
]
K = 8


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("check", CHECKS)
def test_properties(check: Callable[[str, torch.device], None], provider: str, gpu: torch.device) -> None:
    check(provider, gpu)


@pytest.mark.parametrize(("tokens", "width", "features"), [(1, 2304, 16384), (32, 4096, 32768), (300, 2304, 16384)])
def test_ranks_in_real_sizes(tokens: int, width: int, features: int, gpu: torch.device) -> None:
    call = of_rank.generate(
        1, gpu, tokens=tokens, width=width, features=features, rows=16, slots=6, k=features // 50, dtype=torch.bfloat16
    )
    assert not of_rank.disagreements(call, of_rank.run(call, "triton"))


@pytest.mark.parametrize("act", [Act.TOPK, Act.JUMPRELU])
@pytest.mark.parametrize(("tokens", "width", "features"), [(1, 2304, 16384), (32, 4096, 32768), (300, 2304, 16384)])
def test_readout_in_real_sizes(tokens: int, width: int, features: int, act: Act, gpu: torch.device) -> None:
    """Against the implementation in torch, which is held against the definition in sizes that the latter can do."""
    call = of_readout.generate(
        1, gpu, tokens=tokens, width=width, features=features, act=act, topk=64, norm=Norm.LAYER_NORM
    )
    _, values = of_readout.run(call, 64, "triton")
    _, expected = of_readout.run(call, 64, "torch")
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_offsets_beyond_two_to_the_31(gpu: torch.device) -> None:
    width, features = 4096, 2**19 + 70  # times 4096: beyond what 32 bits count
    call = of_readout.generate(1, gpu, tokens=2, width=64, features=70)
    tall = torch.zeros(features, width, device=gpu)
    tall[-70:, :64] = call["enc"]
    x = torch.zeros(2, width, device=gpu)
    x[:, :64] = call["x"]
    scalars = {
        part: torch.cat([call[part][:1].expand(features - 70, -1), call[part]]).contiguous()
        for part in ("row_float", "row_int")
    }
    scalars["row_float"][:-70, 0] = -1.0
    call["wanted"].fill_(1)
    ids, values = of_readout.run(call, K, "triton")
    far_ids, far_values = of_readout.run({**call, **scalars, "x": x, "enc": tall}, K, "triton", guarded=False)
    assert torch.equal(far_ids, torch.where(ids >= 0, ids + features - 70, -1))
    torch.testing.assert_close(far_values, values, rtol=1e-5, atol=1e-5)


def _calls(gpu: torch.device) -> dict[str, tuple[Callable[[], None], dict[str, Any], list[Tensor], ModuleType]]:
    """Of each op: a call with buffers of its own, its tensors, its results, and the module that checks it."""
    active = torch.tensor(True)
    rank_call = of_rank.generate(1, gpu, tokens=40, features=3000, width=256)
    ranks = RankBuffers.empty(tokens=40, rows=3, device=gpu)
    read_call = of_readout.generate(1, gpu, tokens=40, features=3000, width=256)
    read = ReadoutBuffers.empty(tokens=40, features=3000, k=K, device=gpu)
    decode_call = of_decode.generate(1, gpu, tokens=40, width=256)
    out = torch.zeros(40, 256, device=gpu)
    drop_call = of_reconstruct.generate(1, gpu, tokens=40, features=3000, width=256)
    base = torch.zeros(40, 256, device=gpu)
    drop = DropScratch.empty(tokens=40, features=3000, topk=9, device=gpu)
    return {
        "topk_rank": (lambda: topk_rank(active=active, buffers=ranks, **rank_call), rank_call, [ranks.rank], of_rank),
        "topk_readout": (
            lambda: topk_readout(active=active, buffers=read, **read_call),
            read_call,
            [read.ids, read.values],
            of_readout,
        ),
        "sparse_decode": (
            lambda: sparse_decode(active=active, out=out, **decode_call),
            decode_call,
            [out],
            of_decode,
        ),
        "reconstruct": (
            lambda: reconstruct(active=active, base=base, scratch=drop, **drop_call),
            drop_call,
            [base],
            of_reconstruct,
        ),
    }


def _refill(call: dict[str, Any], other: dict[str, Any]) -> None:
    """Puts the contents of another call's tensors where the graph reads them."""
    for name, value in call.items():
        if isinstance(value, Tensor):
            value.copy_(other[name])
        elif hasattr(value, "tensors"):
            for mine, theirs in zip(value.tensors, other[name].tensors, strict=True):
                mine.copy_(theirs)


def _expected(module: ModuleType, call: dict[str, Any]) -> list[Tensor]:
    """The results of a call in eager mode, poison where nothing is written."""
    arguments = (call, K, "triton") if module is of_readout else (call, "triton")
    results = module.run(*arguments)
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("op", MODULES)
def test_a_graph_follows_its_tables(op: str, gpu: torch.device, no_sync: Any) -> None:
    """Captured while no token asks for anything; each replay does what the tables then say."""
    step, call, results, module = _calls(gpu)[op]
    idle = "wanted" if "wanted" in call else "slots"
    held = call[idle].clone()
    call[idle].zero_()
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = [t.clone() for t in results]
    graph.replay()
    assert all(torch.equal(t, old) for t, old in zip(results, before, strict=True))
    sizes = {"tokens": 40, "width": 256} | ({} if op == "sparse_decode" else {"features": 3000})
    for seed in (2, 3):
        other = module.generate(seed, gpu, **sizes)
        other[idle] = held.roll(seed)
        _refill(call, other)
        for t in results:
            t.fill_(-7)
        with no_sync():
            graph.replay()
        for t, fresh in zip(results, _expected(module, call), strict=True):
            written = ~fresh.isnan() if fresh.is_floating_point() else fresh != of_rank.NOT_RANKED
            assert bool(written.any())
            assert bool((t[~written] == -7).all())
            if module is of_rank:  # how far beyond k a count gets before it is given up hangs on timing
                t, fresh = of_rank.decided(call, t), of_rank.decided(call, fresh)
            assert torch.equal(t[written], fresh[written])


@pytest.mark.parametrize("op", MODULES)
def test_nothing_waits_for_the_device(op: str, gpu: torch.device, no_sync: Any) -> None:
    step, *_ = _calls(gpu)[op]
    step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_sync():
        step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_graph_refuses_what_it_cannot_hold(gpu: torch.device) -> None:
    call = of_reconstruct.generate(1, gpu, act=Act.RELU)
    base = torch.zeros(7, 24, device=gpu)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        base.zero_()  # an empty graph warns
        with pytest.raises(RuntimeError, match="no CUDA graph can hold"):
            reconstruct(active=torch.tensor(False), base=base, **call)
