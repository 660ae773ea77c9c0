"""Gemma Scope and Gemma Scope 2: JumpReLU on the raw activation, with everything but the numbers in paths."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.gemma import SCOPE, SCOPE_2, TRANSCODER_2, write_scope, write_scope_2


def forward(raw: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction as the card's snippet has them: pre * (pre > threshold), then relu."""
    raw = {name.replace("w_", "W_"): tensor.double() for name, tensor in raw.items()}
    pre = x @ raw["W_enc"] + raw["b_enc"]
    f = (pre > raw["threshold"]) * pre.relu()
    return f, f @ raw["W_dec"] + raw["b_dec"]


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as data:
        return {name: torch.from_numpy(data[name].astype(np.float64)) for name in data}


# ---------------------------------------------------------------------------------------------- Gemma Scope


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("d_in", [16, 32])
def test_scope(tmp_path: Path, d_in: int, lower: bool, dtype: type) -> None:
    path = write_scope(tmp_path / SCOPE, d_in=d_in, lower=lower, dtype=dtype)
    sae, x = open_sae(path.parent), tokens(d_in)
    assert (sae.spec.family, str(sae.spec.site)) == ("gemma_scope", "resid_post.20")
    assert sae.spec.model_name == "google/gemma-2-2b-pt"
    assert sae.spec.dtype == np.dtype(dtype).name
    assert not sae.spec.subtracts_decoder_bias
    assert_forward(sae, x, *forward(arrays(path), x))
    assert open_sae(path).fingerprint == sae.fingerprint
    if d_in == 16:
        assert_converts(sae, tmp_path / "converted")


@pytest.mark.parametrize(
    ("folder", "site"),
    [
        ("models--google--gemma-scope-9b-it-res/snapshots/ab12/layer_9/width_131k/average_l0_22", "resid_post.9"),
        ("gemma-scope-2b-pt-mlp/layer_5/width_65k/average_l0_34", "mlp_out.5"),
        ("gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_19", "z.0"),
        ("gemma-scope-9b-pt-res-canonical/layer_31/width_16k/canonical", "resid_post.31"),
        ("somewhere/layer_20/width_16k/average_l0_71", "None"),
        ("gemma-scope-2b-pt-res", "None"),
        ("layer_3/gemma-scope-2b-pt-res/width_16k", "None"),
    ],
)
def test_scope_sites(tmp_path: Path, folder: str, site: str) -> None:
    write_scope(tmp_path / folder)
    spec = open_sae(tmp_path / folder).spec
    assert str(spec.site) == site
    assert any("name its site" in note for note in spec.notes) == (site == "None")


def test_scope_transcoder(tmp_path: Path) -> None:
    path = write_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_80", d_out=24)
    sae, x = open_sae(path), tokens(16)
    assert (sae.spec.d_in, sae.spec.d_out, sae.spec.site) == (16, 24, None)
    assert any("norm's gain" in note for note in sae.spec.notes)
    assert_forward(sae, x, *forward(arrays(path), x))


def test_scope_of_embeddings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    write_scope(folder)
    with pytest.raises(UnsupportedCheckpoint, match=r"before the model multiplies them by sqrt\(D\)"):
        open_sae(folder)


@pytest.mark.parametrize("wrong", ["subtracted", "transposed", "gate"])
def test_wrong_forwards_show(tmp_path: Path, wrong: str) -> None:
    path = write_scope(tmp_path / SCOPE, d_in=32)
    sae, x, raw = open_sae(path), tokens(32), arrays(path)
    spoilt = {"transposed": {"W_enc": raw["W_enc"].T}, "gate": {"threshold": raw["threshold"] * 0}}.get(wrong, {})
    seen = x - raw["b_dec"] if wrong == "subtracted" else x
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *forward(raw | spoilt, seen))


def test_compressed_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    path = write_scope(tmp_path / "a b" / SCOPE, compressed=True)
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_sae(path)
    assert f"sae-steer convert '{path}' '{path.with_suffix('')}'" in caught.value.message


def test_compressed_is_unpacked_where_that_is_allowed(tmp_path: Path) -> None:
    path = write_scope(tmp_path / SCOPE, compressed=True)
    (tmp_path / "unpacked").mkdir()
    sae, x = open_sae(path, unpacked=tmp_path / "unpacked"), tokens(16)
    assert str(sae.spec.site) == "resid_post.20"
    assert_forward(sae, x, *forward(arrays(path), x))
    stored = zipfile.ZipFile(next((tmp_path / "unpacked").iterdir()))
    assert {member.compress_type for member in stored.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threshold": DROP}, r"holds no SAE.*params\.npz with W_dec, W_enc, b_dec, b_enc"),
        ({"W_enc": np.ones((32, 16), np.float32)}, r"W_enc has the shape \[32, 16\].*\[16, 32\]"),
        ({"b_dec": np.ones(17, np.float32)}, r"W_enc has the shape \[16, 32\], and by b_dec and b_enc.*\[17, 32\]"),
        ({"w_enc": np.ones((16, 32), np.float32)}, "as W_ and as w_"),
        ({"b_enc": np.ones(32, np.int32)}, r"b_enc is stored as torch\.int32"),
        ({"b_enc": np.ones(32, ">f4")}, "is stored as >f4"),
        ({"b_enc": np.ones(32, bool)}, "is stored as bool"),
        ({"scaling_factor": np.full(32, 2, np.float32)}, "scaling_factor is not 1"),
    ],
)
def test_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write_scope(tmp_path / SCOPE, arrays=changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_sae(path)
    assert str(tmp_path) in caught.value.message


def test_order_and_other_arrays_change_nothing(tmp_path: Path) -> None:
    path = write_scope(tmp_path / SCOPE)
    with np.load(path) as data:
        turned = {name: data[name] for name in reversed(data.files)}
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "params.npz", steps=np.array(3), **turned)
    a, b = (open_sae(place).rows(range(32)) for place in (path, tmp_path / "b"))
    assert torch.equal(a.enc, b.enc)
    assert torch.equal(a.theta, b.theta)


def test_objects_in_an_archive_are_refused(tmp_path: Path) -> None:
    path = write_scope(tmp_path / SCOPE, arrays={"b_enc": np.array([{}] * 32)})
    with pytest.raises(UnsafeCheckpoint, match="Python objects"):
        open_sae(path)


# -------------------------------------------------------------------------------------------- Gemma Scope 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [16, 32])
def test_scope_2(tmp_path: Path, d_in: int, dtype: torch.dtype) -> None:
    written = write_scope_2(tmp_path, d_in=d_in, dtype=dtype)
    sae, x = open_sae(tmp_path), tokens(d_in)
    assert (sae.spec.family, str(sae.spec.site)) == ("gemma_scope_2", "resid_post.12")
    assert (sae.spec.model_name, sae.path) == ("google/gemma-3-4b-it", tmp_path)
    assert_forward(sae, x, *forward(written, x))
    if d_in == 16 and dtype == torch.float32:
        assert_converts(sae, tmp_path / "converted")


def test_scope_2_affine_transcoder(tmp_path: Path) -> None:
    written = write_scope_2(tmp_path, d_out=24, affine=True)
    sae, x = open_sae(tmp_path), tokens(16)
    assert (str(sae.spec.site), sae.spec.skip) == ("mlp_in.12->mlp_out.12", True)
    assert any("W_skip" in note for note in sae.spec.notes)
    assert_forward(sae, x, *forward(written, x))
    assert_converts(sae, tmp_path / "converted")


@pytest.mark.parametrize(
    ("folder", "site"),
    [
        (SCOPE_2, "resid_post.12"),
        (TRANSCODER_2, "mlp_in.12->mlp_out.12"),
        ("gemma-scope-2-1b-pt/attn_out_all/layer_3_width_16k_l0_small", "z.3"),
        ("gemma-scope-2-1b-pt/mlp_out/layer_3_width_16k_l0_big", "mlp_out.3"),
        ("gemma-scope-2-1b-pt/resid_post", "None"),
        ("elsewhere", "None"),
    ],
)
def test_scope_2_without_a_configuration(tmp_path: Path, folder: str, site: str) -> None:
    written = write_scope_2(tmp_path / folder, with_config=False, affine="affine" in folder)
    sae, x = open_sae(tmp_path / folder), tokens(16)
    assert str(sae.spec.site) == site
    assert_forward(sae, x, *forward(written, x))


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.4.self_attn.o_proj.input", "z.4"),
        ("model.layers.4.post_feedforward_layernorm.output", "mlp_out.4"),
        ("model.layers.4.mlp.down_proj.input", "None"),
        (None, "None"),
    ],
)
def test_scope_2_hook_points(tmp_path: Path, hook: str | None, site: str) -> None:
    write_scope_2(tmp_path, config={"hf_hook_point_in": hook, "hf_hook_point_out": DROP})
    spec = open_sae(tmp_path).spec
    assert str(spec.site) == site
    assert any("name" in note.lower() for note in spec.notes) == (site == "None")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"architecture": "topk"}}, "architecture is 'topk', which is refused"),
        ({"affine": True, "config": {"affine_connection": False}}, "holds affine_skip_connection"),
        ({"config": {"affine_connection": True}}, "lacks affine_skip_connection"),
        ({"tensors": {"w_dec": torch.ones(32, 3, 16)}}, "cross-layer transcoder"),
        ({"tensors": {"w_dec": torch.ones(16, 32)}}, r"w_dec has the shape \[16, 32\]"),
        ({"tensors": {"w_enc": torch.ones(24, 32)}}, r"w_enc has the shape \[24, 32\].*\[16, 32\]"),
        ({"tensors": {"threshold": torch.ones(1)}}, r"threshold has the shape \[1\]"),
        ({"tensors": {"b_enc": DROP}}, "holds no SAE"),
    ],
)
def test_scope_2_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write_scope_2(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_scope_2_folder_of_saes(tmp_path: Path) -> None:
    for name in ("layer_1_width_16k_l0_small", "layer_2_width_16k_l0_small"):
        write_scope_2(tmp_path / "resid_post" / name, with_config=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"Name one: layer_1_width_16k_l0_small, layer_2"):
        open_sae(tmp_path / "resid_post")
