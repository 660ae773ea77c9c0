"""sdxl-unbox: a k-sparse autoencoder of what a block adds, without any normalisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.openai_gpt2 import write_openai
from tests.sae_writers.sdxl_unbox import write_sdxl_unbox

D, F, K = 16, 32, 4


def literal(stored: dict[str, Tensor], x: Tensor, *, k: int = K, a: int = 1) -> tuple[Tensor, Tensor]:
    w = {name: value.double() for name, value in stored.items()}
    pre = (x - a * w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    best = pre.topk(k, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    return f, f @ w["decoder.weight"].T + w["pre_bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_features", [F, D])
@pytest.mark.parametrize("wrapped", [True, False])
def test_forward(tmp_path: Path, wrapped: bool, n_features: int, dtype: torch.dtype) -> None:
    stored = write_sdxl_unbox(tmp_path / "a", wrapped=wrapped, n_features=n_features, dtype=dtype, shuffled=True)
    sae, x = open_sae(tmp_path / "a"), tokens(D)
    assert_forward(sae, x, *literal(stored, x))
    spec = sae.spec
    assert (spec.family, spec.k, spec.site, spec.input_norm.value) == ("sdxl_unbox", K, None, "none")
    assert any("output - input" in note for note in spec.notes)
    assert any("mean.pt" in note for note in spec.notes)
    assert open_sae(tmp_path / "a" / "state_dict.pth").fingerprint == sae.fingerprint
    assert_converts(sae, tmp_path / "made")


def test_statistics_may_be_missing(tmp_path: Path) -> None:
    stored = write_sdxl_unbox(tmp_path, statistics=False)
    sae, x = open_sae(tmp_path), tokens(D)
    assert_forward(sae, x, *literal(stored, x))
    assert not any("mean.pt" in note for note in sae.spec.notes)


@pytest.mark.parametrize("wrong", ["k", "bias"])
def test_wrong_readings_show(tmp_path: Path, wrong: str) -> None:
    stored = write_sdxl_unbox(tmp_path)
    sae, x = open_sae(tmp_path), tokens(D)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal(stored, x, k=K + (wrong == "k"), a=wrong != "bias"))


def test_it_is_told_apart_from_openais_which_has_the_same_names(tmp_path: Path) -> None:
    write_sdxl_unbox(tmp_path / "a", wrapped=False)
    path, _ = write_openai(tmp_path)
    assert open_sae(tmp_path / "a").spec.family == "sdxl_unbox"
    assert open_sae(path).spec.family == "openai_gpt2"
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match="holds no SAE"):
        open_sae(tmp_path / "a" / "state_dict.pth")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"config": {"k": 33}}, CheckpointError, "k is 33; needed is at most n_dirs_local"),
        ({"config": {"k": DROP}, "statistics": False}, UnsupportedCheckpoint, "holds no SAE"),
        ({"config": {"n_dirs_local": 31}}, CheckpointError, "by config.json it should be"),
        ({"tensors": {"latent_bias": DROP}}, CheckpointError, "lacks latent_bias"),
        ({"tensors": {"decoder.weight": torch.ones(F, D)}}, CheckpointError, r"decoder\.weight has the shape"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    write_sdxl_unbox(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_state_that_is_no_mapping(tmp_path: Path) -> None:
    write_sdxl_unbox(tmp_path)
    torch.save({"state_dict": torch.ones(3)}, tmp_path / "state_dict.pth")
    with pytest.raises(CheckpointError, match="state_dict is a Tensor"):
        open_sae(tmp_path)


def test_truncated(tmp_path: Path) -> None:
    write_sdxl_unbox(tmp_path)
    path = tmp_path / "state_dict.pth"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        open_sae(tmp_path)
