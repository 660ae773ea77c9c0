"""Transcoders in circuit-tracer's layout: one file for each layer, its activation by what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.layer_transcoders import write_layer_transcoder

D, D_OUT, F, K = 16, 24, 32, 4


def literal(stored: dict[str, Tensor], x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Activations, and the reconstruction less the skip connection."""
    w = {name: value.double() for name, value in stored.items()}
    pre = x @ w["W_enc"].T + w["b_enc"]
    f = pre.relu()
    if activation == "jumprelu":
        f = pre * (pre > w["activation_function.threshold"])
    elif activation == "topk":
        best = pre.topk(K, dim=-1)
        f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    return f, f @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_forward(tmp_path: Path, activation: str, skip: bool, dtype: torch.dtype) -> None:
    path, stored = write_layer_transcoder(tmp_path / "a", activation=activation, skip=skip, dtype=dtype, shuffled=True)
    sae, x = open_sae(path), tokens(D)
    assert_forward(sae, x, *literal(stored, x, activation))
    spec = sae.spec
    assert (spec.family, str(spec.site), spec.skip) == ("layer_transcoders", "mlp_in.5->mlp_out.5", skip)
    assert (spec.d_in, spec.d_out, spec.k) == (D, D_OUT, K if activation == "topk" else None)
    assert spec.model_name == "Qwen/Qwen3-4B"
    assert_converts(sae, tmp_path / "made")
    assert open_sae(tmp_path / "made").spec.skip is skip


def test_a_square_one_is_read_by_its_layout(tmp_path: Path) -> None:
    path, stored = write_layer_transcoder(tmp_path, n_features=D, d_out=D)
    sae, x = open_sae(path), tokens(D)
    assert_forward(sae, x, *literal(stored, x, "relu"))
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal({**stored, "W_enc": stored["W_enc"].T}, x, "relu"))


def test_subtracting_the_bias_shows(tmp_path: Path) -> None:
    path, stored = write_layer_transcoder(tmp_path, d_out=D)
    sae, x = open_sae(path), tokens(D)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal(stored, x - stored["b_dec"].double(), "relu"))


@pytest.mark.parametrize("lacking", ["file", "key", "hook"])
def test_without_hooks_the_user_names_the_site(tmp_path: Path, lacking: str) -> None:
    changes = {"key": {"feature_input_hook": DROP}, "hook": {"feature_input_hook": "ln2.hook_normalized"}}.get(lacking)
    path, _ = write_layer_transcoder(tmp_path, config=changes)
    if lacking == "file":
        (tmp_path / "config.yaml").unlink()
    spec = open_sae(path).spec
    assert spec.site is None
    assert any("site" in note for note in spec.notes)


def test_other_hooks_are_other_sites(tmp_path: Path) -> None:
    path, _ = write_layer_transcoder(tmp_path, config={"feature_input_hook": "hook_resid_mid"})
    assert str(open_sae(path).spec.site) == "resid_mid.5->mlp_out.5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[unclosed", "not readable YAML"),
        ("- 1\n", "holds a list"),
        ("!!python/object/apply:os.system ['true']", "not readable YAML"),
        ("feature_input_hook: 3\nfeature_output_hook: x\n", "feature_input_hook is 3"),
        ("#" * (2**20 + 1), "larger than"),
    ],
    ids=["broken", "list", "hostile", "number", "large"],
)
def test_bad_configurations(tmp_path: Path, content: str, message: str) -> None:
    path, _ = write_layer_transcoder(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_sae(path)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"activation": "jumprelu", "tensors": {"activation_function.threshold": torch.full((F,), -0.1)}},
            UnsupportedCheckpoint,
            "keeps negative",
        ),
        ({"activation": "topk", "tensors": {"k": torch.tensor(33)}}, CheckpointError, "k is 33"),
        ({"activation": "topk", "tensors": {"k": torch.tensor(4.0)}}, CheckpointError, r"k is 4\.0"),
        ({"activation": "jumprelu", "tensors": {"k": torch.tensor(4)}}, CheckpointError, "holds both"),
        ({"tensors": {"W_enc": torch.ones(D, F)}}, CheckpointError, "W_enc has the shape"),
        ({"skip": True, "tensors": {"W_skip": torch.ones(D, D_OUT)}}, CheckpointError, "W_skip has the shape"),
        ({"tensors": {"W_dec": torch.ones(F, 3, D)}}, CheckpointError, "W_dec has the shape"),
        ({"tensors": {"b_enc": torch.ones(F, dtype=torch.int8)}}, UnsupportedCheckpoint, "torch.int8"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    path, _ = write_layer_transcoder(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_sae(path)
    assert str(path) in str(caught.value)


def test_a_folder_of_layers_asks_for_one(tmp_path: Path) -> None:
    for layer in (0, 1):
        write_layer_transcoder(tmp_path, layer=layer)
    with pytest.raises(UnsupportedCheckpoint, match=r"Name one: layer_0\.safetensors, layer_1\.safetensors"):
        open_sae(tmp_path)


def test_truncated(tmp_path: Path) -> None:
    path, _ = write_layer_transcoder(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_sae(path)
