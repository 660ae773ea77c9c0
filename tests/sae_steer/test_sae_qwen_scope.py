"""Qwen-Scope: k from the repository's name, and what is said of values below zero."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.qwen_scope import FEATURES, REPOSITORY, K, write_qwen_scope

D = 16


def literal(stored: dict[str, Tensor], x: Tensor, *, k: int = K) -> tuple[Tensor, Tensor]:
    """The model card's forward: the k largest, scattered, whatever their sign."""
    w = {name: value.double() for name, value in stored.items()}
    pre = x @ w["W_enc"].T + w["b_enc"]
    best = pre.topk(k, dim=-1)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    return f, f @ w["W_dec"].T + w["b_dec"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(tmp_path: Path, dtype: torch.dtype) -> None:
    path, stored = write_qwen_scope(tmp_path, dtype=dtype, shuffled=True, tensors={"more": torch.ones(2)})
    sae, x = open_sae(path), tokens(D)
    assert_forward(sae, x, *literal(stored, x))
    spec = sae.spec
    assert (spec.family, spec.k, str(spec.site)) == ("qwen_scope", K, "resid_post.7")
    assert (spec.model_name, spec.value_convention) == ("Qwen3-1.7B-Base", "raw")
    assert not spec.subtracts_decoder_bias
    assert_converts(sae, tmp_path / "made")


def test_as_many_features_as_the_model_is_wide(tmp_path: Path) -> None:
    path, stored = write_qwen_scope(tmp_path, d_in=FEATURES)
    sae, x = open_sae(path), tokens(FEATURES, count=3)
    assert_forward(sae, x, *literal(stored, x))
    flipped = {**stored, "W_enc": stored["W_enc"].T, "W_dec": stored["W_dec"].T}
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal(flipped, x))


@pytest.mark.parametrize("wrong", ["k", "bias"])
def test_wrong_readings_show(tmp_path: Path, wrong: str) -> None:
    path, stored = write_qwen_scope(tmp_path)
    sae, x = open_sae(path), tokens(D)
    seen = x - stored["b_dec"].double() if wrong == "bias" else x
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal(stored, seen, k=K + 1 if wrong == "k" else K))


def test_values_below_zero_are_the_one_difference_and_noted(tmp_path: Path) -> None:
    path, stored = write_qwen_scope(tmp_path, bias=-6.0)  # hardly anything is positive
    sae, x = open_sae(path), tokens(D)
    f, _ = literal(stored, x)
    assert (f < 0).any()
    w_dec, b_dec = stored["W_dec"].double(), stored["b_dec"].double()
    assert_forward(sae, x, f.relu(), f.relu() @ w_dec.T + b_dec)
    assert any("reads as 0 here" in note for note in sae.spec.notes)


def test_the_hubs_cache_keeps_the_name(tmp_path: Path) -> None:
    path, _ = write_qwen_scope(tmp_path, repository=f"models--Qwen--{REPOSITORY}/snapshots/0123abc")
    assert open_sae(path).spec.k == K


def test_a_folder_of_layers_asks_for_one(tmp_path: Path) -> None:
    for layer in (0, 1):
        path, _ = write_qwen_scope(tmp_path, layer=layer)
    with pytest.raises(UnsupportedCheckpoint, match=r"Name one: layer0\.sae\.pt, layer1\.sae\.pt"):
        open_sae(path.parent)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"repository": "some-folder"}, UnsupportedCheckpoint, "in the name of its repository"),
        ({"repository": "SAE-Res-Qwen3-8B-Base-W2K-L0_50"}, CheckpointError, "1024 features.*should be 2048"),
        ({"repository": "SAE-Res-Qwen3-8B-Base-W1K-L0_5000"}, CheckpointError, "k is 5000"),
        ({"tensors": {"b_dec": DROP}}, UnsupportedCheckpoint, "holds no SAE"),
        ({"tensors": {"W_enc": torch.ones(D, FEATURES)}}, CheckpointError, r"W_enc has the shape \[16, 1024\]"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    path, _ = write_qwen_scope(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_sae(path)
    assert str(path) in str(caught.value)
