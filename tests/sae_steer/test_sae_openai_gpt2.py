"""OpenAI's SAEs of GPT-2 small: subtracted after the layer norm, and ranked where they are a TopK."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.openai_gpt2 import write_openai

D, F, K = 16, 32, 4


def literal(stored: dict[str, Any], x: Tensor, *, topk: bool, norm: str = "after") -> tuple[Tensor, Tensor]:
    w = {name: value.double() for name, value in stored.items() if isinstance(value, Tensor)}
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    seen = x
    if topk and norm == "before":  # the wrong order: the bias goes before the norm is taken
        seen = x - w["pre_bias"]
        mean, std = seen.mean(-1, keepdim=True), seen.std(-1, keepdim=True)
        seen = (seen - mean) / (std + 1e-5)
    else:
        seen = ((x - mean) / (std + 1e-5) if topk else x) - (0 if norm == "nothing" else w["pre_bias"])
    pre = seen @ w["encoder.weight"].T + w["latent_bias"]
    f = pre.relu()
    if topk:
        best = pre.topk(K, dim=-1)
        f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    decoded = f @ w["decoder.weight"].T + w["pre_bias"]
    return f, decoded * std + mean if topk else decoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_features", [F, D])
@pytest.mark.parametrize("topk", [True, False])
def test_forward(tmp_path: Path, topk: bool, n_features: int, dtype: torch.dtype) -> None:
    path, stored = write_openai(tmp_path, topk=topk, n_features=n_features, dtype=dtype, shuffled=True)
    sae, x = open_sae(path), tokens(D)
    assert_forward(sae, x, *literal(stored, x, topk=topk))
    spec = sae.spec
    assert (spec.family, spec.k, spec.input_norm.value) == (
        "openai_gpt2",
        K if topk else None,
        "layer_norm" if topk else "none",
    )
    assert (str(spec.site), spec.model_name, spec.value_convention) == ("resid_post.3", "gpt2", "raw")
    assert_converts(sae, tmp_path / "made")


@pytest.mark.parametrize("norm", ["before", "nothing"])
def test_wrong_readings_show(tmp_path: Path, norm: str) -> None:
    path, stored = write_openai(tmp_path)
    sae, x = open_sae(path), tokens(D)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal(stored, x, topk=True, norm=norm))


def test_the_first_files_name_no_activation(tmp_path: Path) -> None:
    path, stored = write_openai(tmp_path, topk=False, place="mlp_post_act", values={"activation": DROP, "more": 3})
    sae, x = open_sae(path), tokens(D)
    assert_forward(sae, x, *literal(stored, x, topk=False))
    assert sae.spec.site is None
    assert any("activation function" in note for note in sae.spec.notes)


def test_k_may_be_a_tensor(tmp_path: Path) -> None:
    path, _ = write_openai(tmp_path, k=torch.tensor(K))
    assert open_sae(path).spec.k == K


@pytest.mark.parametrize(
    ("place", "site"),
    [
        ("resid_delta_attn_v5_128k", "attn_out.3"),
        ("resid_delta_mlp", "mlp_out.3"),
        ("resid_post_attn_v4", "resid_mid.3"),
        ("resid_post_mlp", "resid_post.3"),
    ],
)
def test_sites(tmp_path: Path, place: str, site: str) -> None:
    path, _ = write_openai(tmp_path, place=place)
    assert str(open_sae(path).spec.site) == site
    assert str(open_sae(path.parent).spec.site) == site  # one file in the folder


def test_without_the_published_path_the_user_names_the_site(tmp_path: Path) -> None:
    path, _ = write_openai(tmp_path, place="elsewhere")
    spec = open_sae(path).spec
    assert spec.site is None
    assert any("LOCATION/autoencoders/LAYER.pt" in note for note in spec.notes)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"activation": "Identity"}, UnsupportedCheckpoint, "activation is 'Identity'"),
        ({"activation_state_dict": DROP}, CheckpointError, "lacks activation_state_dict"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, UnsupportedCheckpoint, "postact_fn"),
        ({"activation_state_dict": {"k": "4", "postact_fn": "ReLU"}}, CheckpointError, "k is '4'"),
        ({"activation_state_dict": {"k": 33, "postact_fn": "ReLU"}}, CheckpointError, "k is 33; needed is 1 to 32"),
        ({"decoder.weight": torch.ones(F, D)}, CheckpointError, r"decoder\.weight has the shape \[32, 16\]"),
        ({"encoder.weight": torch.ones(F, D, dtype=torch.int8)}, UnsupportedCheckpoint, "torch.int8"),
    ],
)
def test_refused(tmp_path: Path, values: dict[str, Any], kind: type[Exception], message: str) -> None:
    path, _ = write_openai(tmp_path, values=values)
    with pytest.raises(kind, match=message) as caught:
        open_sae(path)
    assert str(path) in str(caught.value)


def test_truncated(tmp_path: Path) -> None:
    path, _ = write_openai(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        open_sae(path)


class Model(torch.nn.ReLU):
    """Stands for an object that only its own code can load."""


def test_objects_are_refused_by_name(tmp_path: Path) -> None:
    path, _ = write_openai(tmp_path, values={"activation": Model()})
    with pytest.raises(UnsafeCheckpoint, match=r"looks up .*Model"):
        open_sae(path)
