"""Kernels with one thing wrong in their source: the properties must see each."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_steer_kernels import RECONSTRUCT, SPARSE_DECODE, TOPK_RANK, TOPK_READOUT
from sae_steer_kernels._op import Op
from tests.kernels.properties import reconstruct as of_reconstruct
from tests.kernels.properties import sparse_decode as of_decode
from tests.kernels.properties import topk_rank as of_rank
from tests.kernels.properties import topk_readout as of_readout

CPU = torch.device("cpu")
Check = Callable[[str, torch.device], None]
# Which op, what stands in its source, what is put there, and the property that must fail.
WRONG: dict[str, tuple[Op, str, str, Check]] = {
    "rank: gives up after one": (TOPK_RANK, "fewest >= k", "fewest >= 1", of_rank.check_against_definition),
    "rank: nothing is undecided": (
        TOPK_RANK,
        "if undecided > 0:",
        "if undecided < 0:",
        of_rank.check_against_definition,
    ),
    "rank: equals count": (TOPK_RANK, "f > threshold[", "f >= threshold[", of_rank.check_ties_count_as_members),
    "rank: slot 0 is a slot": (TOPK_RANK, "if slot == 0:", "if slot == -1:", of_rank.check_idle),
    "rank: rows that are not in use": (
        TOPK_RANK,
        "used = tl.load(slot_int + slot * _SLOT_INTS + _ROWS)",
        "used = K",
        of_rank.check_against_definition,
    ),
    "rank: any dictionary's rows": (
        TOPK_RANK,
        "mask=row < used, other=-1) == sae)",
        "mask=row < used, other=-1) >= 0)",
        of_rank.check_against_definition,
    ),
    "readout: one feature a group": (
        TOPK_READOUT,
        "bitcast=True) >= least).to(tl.int32)\n        alone",
        "bitcast=True) > 2147483646).to(tl.int32)\n        alone",
        of_readout.check_against_definition,
    ),
    "readout: a group too few": (TOPK_READOUT, "(equal) <= k", "(equal) < k", of_readout.check_against_definition),
    "readout: the later of two equals": (
        TOPK_READOUT,
        "j[None, :] < i[:, None]",
        "j[None, :] > i[:, None]",
        of_readout.check_ties_go_to_the_lower_number,
    ),
    "readout: more than the dictionary's k": (
        TOPK_READOUT,
        "tl.where(members > 0, members, count)",
        "count",
        of_readout.check_against_definition,
    ),
    "readout: everyone is wanted": (
        TOPK_READOUT,
        "if tl.load(wanted + token) == 0:",
        "if tl.load(wanted + token) == -1:",
        of_readout.check_idle,
    ),
    "decode: values of no feature": (
        SPARSE_DECODE,
        "mask=held, other=0.0)\n        rows",
        "mask=place < k, other=0.0)\n        rows",
        of_decode.check_against_definition,
    ),
    "decode: columns beyond the end": (
        SPARSE_DECODE,
        "tl.store(out + token * out_stride + columns, total, mask=inside)",
        "tl.store(out + token * out_stride + columns, total)",
        of_decode.check_against_definition,
    ),
    "reconstruct: the other tokens": (
        RECONSTRUCT,
        "(held != 0)",
        "(held == 0)",
        of_reconstruct.check_topk_against_definition,
    ),
    "reconstruct: no mean": (
        RECONSTRUCT,
        "if norm == _CENTER:",
        "if norm == -1:",
        of_reconstruct.check_topk_against_definition,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_kernel_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op, old, new, check = WRONG[what]
    original = importlib.util.find_spec(f"sae_steer_kernels.{op.name}.triton_impl")
    assert original is not None
    assert original.origin is not None
    source = Path(original.origin).read_text()
    assert source.count(old) == 1
    changed = tmp_path / "changed.py"
    changed.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("changed", changed)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(op.implementations, "triton", getattr(module, f"{op.name}_triton"))
    with pytest.raises(AssertionError):
        check("triton", CPU)
