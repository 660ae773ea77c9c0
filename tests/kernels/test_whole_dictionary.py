"""The two ops that need a whole dictionary, against the literal float64 encode and decode."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_steer.reference import decode, encode
from sae_steer.sae import open_sae
from sae_steer.tables import Whole
from sae_steer_kernels import EditTable, RankBuffers, RowInt, SlotInt, reconstruct, topk_rank
from tests.sae_files import write_saelens

ON = torch.tensor(True)
CPU = torch.device("cpu")
D, F = 12, 40


def _table(whole: Whole, features: list[int]) -> EditTable:
    table = EditTable.empty(slots=2, rows=4, width=D, width_out=D, dtype=torch.float32, device=CPU)
    table.enc[1, : len(features)] = whole.enc[features]
    table.row_float[1, : len(features)] = whole.row_float[features]
    table.row_int[1, : len(features)] = whole.row_int[features]
    table.slot_int[1, SlotInt.ROWS] = len(features)
    table.slot_int[:, SlotInt.DROP_SAE] = -1
    return table


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_reconstruct(tmp_path: Path, architecture: str, norm: str) -> None:
    write_saelens(tmp_path, architecture=architecture, d_in=D, n_features=F, seed=1, normalize_activations=norm)
    sae = open_sae(tmp_path)
    whole = Whole.load(sae, 0, CPU)
    table = _table(whole, [3])
    table.slot_int[1, SlotInt.DROP_SELECT], table.slot_int[1, SlotInt.DROP_SAE] = 2, 0
    y = torch.randn(6, D)
    slots = torch.tensor([0, 1, 1, 2, 1, 0], dtype=torch.int32)
    bits = torch.tensor([2, 2, 1, 2, 3, 0], dtype=torch.int32)
    base = torch.full((6, D), torch.nan)
    decoder = (whole.dec, whole.dec_bias)
    reconstruct(y, slots, bits, ON, table.slot_int, 0, whole.enc, *decoder, whole.row_float, whole.row_int, base)
    for t in range(6):
        if t in (1, 4):  # its slot drops this SAE's error, and its bits meet the selector
            x = y[t].double()
            torch.testing.assert_close(base[t].double(), decode(sae, encode(sae, x), x) - x, atol=1e-4, rtol=1e-4)
        else:
            assert base[t].isnan().all()


def _ranks(whole: Whole, table: EditTable, y: Tensor, slots: Tensor) -> Tensor:
    buffers = RankBuffers.empty(tokens=y.shape[0], rows=4, device=CPU)
    buffers.rank.fill_(-1)
    topk_rank(y, slots, ON, table, 0, whole.enc, whole.row_float, whole.row_int, buffers)
    return buffers.rank


def test_topk_membership_equals_the_definition(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="topk", d_in=D, n_features=F, seed=2, k=6)
    sae = open_sae(tmp_path)
    whole = Whole.load(sae, 0, CPU)
    features = [0, 7, 7, 39]
    table = _table(whole, features)
    y = torch.randn(50, D)
    rank = _ranks(whole, table, y, torch.ones(50, dtype=torch.int32))
    assert int(table.row_int[1, 0, RowInt.TOPK]) == 6
    for t in range(50):
        active = encode(sae, y[t].double())[features] > 0
        positive = (whole.enc[features] @ y[t] + whole.row_float[features, 0]) > 0
        assert torch.equal((rank[t] < 6) & positive, active)
    # Ranks of another dictionary at the same site are not this one's business.
    table.row_int[1, :, RowInt.SAE] = 1
    assert (_ranks(whole, table, y, torch.ones(50, dtype=torch.int32)) == -1).all()


def test_ties_count_as_members(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="topk", d_in=D, n_features=F, seed=3, k=2)
    whole = Whole.load(open_sae(tmp_path), 0, CPU)
    whole.enc[5:9] = whole.enc[5]
    whole.row_float[5:9, 0] = 100.0  # four equal largest pre-activations, and k = 2
    table = _table(whole, [5, 6, 7, 8])
    assert (_ranks(whole, table, torch.randn(3, D), torch.ones(3, dtype=torch.int32)) == 0).all()
