"""What the kernels over a whole dictionary become on each target."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_steer_kernels import DropScratch, RankBuffers, ReadoutBuffers, RowFloat, RowInt, SlotInt
from tests.kernels.aot.harness import TARGETS, Machine, compiling

MATRIX = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "gfx942": r"\bv_mfma_f32_\S*bf16"}
# 16 bytes a load; into shared memory, around the registers, where there is an instruction for it.
WIDE = {"sm_80": r"LDGSTS\.E\S*\.128", "sm_90": r"LDGSTS\.E\S*\.128", "gfx942": r"(?:global|buffer)_load_dwordx4"}
SIZES = [(1, 2304, 16384), (32, 4096, 65536), (256, 8192, 131072)]  # T, D, F
USUAL = [("sm_80", 32), ("sm_90", 32), ("sm_90", 256), ("gfx942", 32)]
LAUNCHES = [
    pytest.param(
        target, size, id=f"{target}-T{size[0]}", marks=[] if (target, size[0]) in USUAL else [pytest.mark.slow]
    )
    for target in TARGETS
    for size in SIZES
]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int32)


def _whole(features: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(features, width), _empty(features, len(RowFloat)), _ints(features, len(RowInt))


def _rank(target: str, cache: Path, tokens: int, width: int, features: int, *, residual: bool = False) -> list[Machine]:
    from sae_steer_kernels.topk_rank.triton_impl import topk_rank_triton

    rows = 8
    table = (
        _empty(9, rows, width),
        _empty(9, rows, len(RowFloat)),
        _ints(9, rows, len(RowInt)),
        _ints(9, len(SlotInt)),
    )
    b = RankBuffers.empty(tokens=tokens, rows=rows, device=torch.device("meta"))
    y = _empty(tokens, width, dtype=torch.bfloat16)
    with compiling(target, cache) as machines:
        topk_rank_triton(
            y, _ints(tokens), *table, 0, *_whole(features, width),
            b.rank, b.moments, b.own, b.which, b.todo, None, y if residual else None,
        )  # fmt: skip
    return machines


def _readout(target: str, cache: Path, tokens: int, width: int, features: int) -> list[Machine]:
    from sae_steer_kernels.topk_readout.triton_impl import topk_readout_triton

    buffers = ReadoutBuffers.empty(tokens=tokens, features=features, k=32, device=torch.device("meta"))
    x = _empty(tokens, width, dtype=torch.bfloat16)
    with compiling(target, cache) as machines:
        topk_readout_triton(x, _ints(tokens), *_whole(features, width), *buffers.all, None)
    return machines


def _encodes(machine: Machine) -> None:
    """The product is on tensor cores, and the dictionary comes in loads of 16 bytes."""
    machine.check()
    assert machine.count(MATRIX[machine.target]) > 0, machine.row
    assert machine.count(WIDE[machine.target]) > 0, machine.row
    # Tokens come in 8 bytes where a thread has no more to load.
    assert machine.count(r"LDGSTS\.E\b(?!\S*(?:128|64))") == 0, machine.row


@pytest.mark.parametrize(("target", "size"), LAUNCHES)
def test_topk_rank(target: str, size: tuple[int, int, int], cache: Path) -> None:
    own, count = _rank(target, cache, *size)
    own.check(registers=128)
    _encodes(count)
    print(own.row, count.row, sep="\n")


@pytest.mark.parametrize(("target", "size"), LAUNCHES)
def test_topk_readout(target: str, size: tuple[int, int, int], cache: Path) -> None:
    listing, scan, choose, value, order = _readout(target, cache, *size)
    for machine in (listing, choose, value, order):
        machine.check(registers=128)
    _encodes(scan)
    print(*(machine.row for machine in (listing, scan, choose, value, order)), sep="\n")


@pytest.mark.parametrize("target", TARGETS)
def test_decoders(target: str, cache: Path) -> None:
    from sae_steer_kernels.reconstruct.triton_impl import reconstruct_triton
    from sae_steer_kernels.sparse_decode.triton_impl import sparse_decode_triton

    tokens, width, features, k = 32, 2304, 16384, 64
    drop = DropScratch.empty(tokens=tokens, features=features, topk=k, device=torch.device("meta"))
    enc, row_float, row_int = _whole(features, width)
    step = (_empty(tokens, width, dtype=torch.bfloat16), _ints(tokens), _ints(tokens), _ints(9, len(SlotInt)), 0)
    dec, bias, out = _empty(features, width), _empty(width), _empty(tokens, width)
    with compiling(target, cache) as machines:
        sparse_decode_triton(_ints(tokens, k), _empty(tokens, k), _ints(tokens), dec, out, bias)
        reconstruct_triton(*step, enc, dec, bias, row_float, row_int, out, drop.all, None, None)
    decode, select, *_, base = machines
    for machine in (decode, select, base):
        machine.check(registers=128)
    wide = r"LDG\.E\S*\.128" if target.startswith("sm") else WIDE[target]
    assert decode.count(wide) > 0
    assert base.count(wide) > 0
    print(decode.row, select.row, base.row, sep="\n")


def test_two_parts_of_the_stream(cache: Path) -> None:
    _, count = _rank("sm_90", cache, 32, 4096, 65536, residual=True)
    _encodes(count)


def test_a_width_that_is_not_aligned_is_seen(cache: Path) -> None:
    _, count = _rank("sm_90", cache, 32, 4095, 65536)
    with pytest.raises(AssertionError):
        _encodes(count)
