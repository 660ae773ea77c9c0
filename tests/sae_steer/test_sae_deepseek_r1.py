"""qresearch's SAE of DeepSeek-R1: plain ReLU, told by its published name only."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.deepseek_r1 import NAME, write_deepseek_r1

D, F = 16, 32


def literal(stored: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    w = {name: value.double() for name, value in stored.items()}
    f = (x @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    return f, f @ w["decoder.weight"].T + w["decoder.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_features", [F, D])
def test_forward(tmp_path: Path, n_features: int, dtype: torch.dtype) -> None:
    path, stored = write_deepseek_r1(tmp_path / "a", n_features=n_features, dtype=dtype, shuffled=True)
    sae, x = open_sae(path), tokens(D)
    assert_forward(sae, x, *literal(stored, x))
    assert (sae.spec.family, str(sae.spec.site), sae.spec.model_name) == (
        "deepseek_r1",
        "resid_post.19",
        "DeepSeek-R1-Distill-Llama-8B",
    )
    assert open_sae(path.parent).fingerprint == sae.fingerprint
    assert_converts(sae, tmp_path / "made")


def test_wrong_readings_show(tmp_path: Path) -> None:
    path, stored = write_deepseek_r1(tmp_path)
    sae, x = open_sae(path), tokens(D)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal(stored, x - stored["decoder.bias"].double()))


def test_the_name_may_be_the_folders(tmp_path: Path) -> None:
    path, _ = write_deepseek_r1(tmp_path / NAME, name="sae.pt")
    assert str(open_sae(path).spec.site) == "resid_post.19"


@pytest.mark.parametrize("other", ["name", "config", "keys"])
def test_look_alikes_are_not_assumed_to_be_it(tmp_path: Path, other: str) -> None:
    name = "sae.pt" if other == "name" else f"{NAME}.pt"
    path, _ = write_deepseek_r1(tmp_path, name=name, tensors={"threshold": torch.ones(1)} if other == "keys" else None)
    if other == "config":
        (tmp_path / "config.json").write_text(json.dumps({"activation": "topk", "k": 4}))
    with pytest.raises(UnsupportedCheckpoint):
        open_sae(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"decoder.weight": torch.ones(F, D)}, r"decoder\.weight has the shape \[32, 16\]"),
        ({"encoder.bias": torch.ones(F - 1)}, "shape"),
    ],
)
def test_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path, _ = write_deepseek_r1(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        open_sae(path)


def test_asked_for_by_name_it_says_what_it_lacks(tmp_path: Path) -> None:
    path, _ = write_deepseek_r1(tmp_path, tensors={"decoder.bias": DROP})
    with pytest.raises(CheckpointError, match=r"lacks decoder\.bias"):
        open_sae(path, family="deepseek_r1")


def test_truncated(tmp_path: Path) -> None:
    path, _ = write_deepseek_r1(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        open_sae(path)
