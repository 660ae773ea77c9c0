"""sparsify: ReLU then TopK, with the decoder's bias subtracted in all but the newer transcoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_steer.errors import CheckpointError
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.sparsify import write_sparsify


def forward(folder: Path, x: Tensor, *, subtract: bool, k: int = 4) -> tuple[Tensor, Tensor]:
    """Activations, and the reconstruction without its skip connection, which no edit touches."""
    raw = {name: tensor.double() for name, tensor in load_file(folder / "sae.safetensors").items()}
    seen = x - raw["b_dec"] if subtract else x
    post = (seen @ raw["encoder.weight"].T + raw["encoder.bias"]).relu()
    best = post.topk(k, dim=-1)
    f = torch.zeros_like(post).scatter(-1, best.indices, best.values)
    return f, f @ raw["W_dec"] + raw["b_dec"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expansion", [1, 2])
def test_autoencoder(tmp_path: Path, expansion: int, dtype: torch.dtype) -> None:
    folder = write_sparsify(tmp_path, expansion=expansion, dtype=dtype)
    sae, x = open_sae(folder), tokens(16)
    assert (sae.spec.family, sae.spec.k, sae.spec.n_features) == ("sparsify", 4, 16 * expansion)
    assert (str(sae.spec.site), sae.spec.model_name) == ("resid_post.3", "EleutherAI/pythia-160m")
    assert sae.spec.dtype == str(dtype).removeprefix("torch.")
    assert_forward(sae, x, *forward(folder, x, subtract=True))
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *forward(folder, x, subtract=False))
    if dtype == torch.float32:
        assert_converts(sae, tmp_path / "converted")


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder(tmp_path: Path, skip: bool) -> None:
    folder = write_sparsify(tmp_path, "layers.5.mlp", transcode=True, skip=skip, num_latents=48)
    sae, x = open_sae(folder), tokens(16)
    assert (str(sae.spec.site), sae.spec.skip, sae.spec.n_features) == ("mlp_in.5->mlp_out.5", skip, 48)
    assert_forward(sae, x, *forward(folder, x, subtract=False))
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *forward(folder, x, subtract=True))


def test_a_transcoder_of_before_february_2025_subtracts(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path, "layers.5.mlp", transcode=True, skip=True, old=True)
    sae, x = open_sae(folder), tokens(16)
    assert str(sae.spec.site) == "mlp_in.5->mlp_out.5"
    assert any("before February 2025: it subtracts" in note for note in sae.spec.notes)
    assert_forward(sae, x, *forward(folder, x, subtract=True))


def test_an_old_file_that_may_be_a_transcoder_says_no_site(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path, "layers.5", transcode=True, skip=True, old=True, model=None)
    spec = open_sae(folder).spec
    assert spec.site is None
    assert any("may be a transcoder" in note for note in spec.notes)


@pytest.mark.parametrize(
    ("hookpoint", "model", "site"),
    [
        ("layers.23", None, "resid_post.23"),
        ("h.3", "openai-community/gpt2", "resid_post.3"),
        ("model.layers.7", "meta-llama/Llama-3.1-8B", "resid_post.7"),
        ("gpt_neox.layers.2.attention", "EleutherAI/pythia-70m", "attn_out.2"),
        ("layers.29.mlp", "meta-llama/Llama-3.1-8B", "mlp_out.29"),
        ("layers.29.mlp", "google/gemma-2-9b", "None"),
        ("layers.29.mlp", None, "None"),
        ("embed_tokens", "meta-llama/Llama-3.1-8B", "None"),
        ("my sae", None, "None"),
    ],
)
def test_hookpoints(tmp_path: Path, hookpoint: str, model: str | None, site: str) -> None:
    spec = open_sae(write_sparsify(tmp_path, hookpoint, model=model)).spec
    assert str(spec.site) == site
    assert any("name its site" in note for note in spec.notes) == (site == "None")


def test_a_transcoder_of_a_whole_layer_reads_what_enters_it(tmp_path: Path) -> None:
    assert str(open_sae(write_sparsify(tmp_path, transcode=True)).spec.site) == "resid_pre.3->resid_post.3"


def test_a_transcoder_of_attention_reads_what_is_no_site(tmp_path: Path) -> None:
    assert open_sae(write_sparsify(tmp_path, "layers.3.self_attn", transcode=True)).spec.site is None


def test_a_run_names_its_saes(tmp_path: Path) -> None:
    for layer in (1, 2):
        write_sparsify(tmp_path, f"layers.{layer}")
    with pytest.raises(CheckpointError, match=r"Name one: layers\.1, layers\.2"):
        open_sae(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg": {"activation": "groupmax"}}, "activation is 'groupmax', which is refused: .*largest of its group"),
        ({"cfg": {"activation": "jumprelu"}}, "known is topk"),
        ({"cfg": {"signed": True}}, "signed is True, which is refused"),
        ({"cfg": {"batch_topk": True}}, "batch_topk is True, which is refused"),
        ({"cfg": {"sample_topk": True}}, "sample_topk"),
        ({"cfg": {"input_unit_norm": True}}, "input_unit_norm"),
        ({"k": 33}, "at most the number of latents, 32"),
        ({"cfg": {"d_in": DROP}}, "d_in is None"),
        ({"cfg": {"expansion_factor": DROP}}, "expansion_factor is None"),
        ({"cfg": {"num_latents": 33}}, r"encoder\.bias has the shape \[32\], and by cfg\.json it should be \[33\]"),
        ({"cfg": {"num_latents": "0"}}, "num_latents is '0'"),
        ({"tensors": {"W_dec": torch.ones(16, 32)}}, r"W_dec has the shape \[16, 32\].*\[32, 16\]"),
        ({"tensors": {"W_dec": DROP}}, "lacks W_dec"),
        ({"skip": True, "tensors": {"W_skip": DROP}}, "lacks W_skip"),
        ({"tensors": {"W_skip": torch.ones(16, 16)}}, "holds W_skip"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folder = write_sparsify(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_sae(folder)
    assert str(folder) in caught.value.message


def test_other_tensors_change_nothing(tmp_path: Path) -> None:
    plain = open_sae(write_sparsify(tmp_path / "a")).rows(range(32))
    more = open_sae(write_sparsify(tmp_path / "b", tensors={"A_first": torch.ones(3), "z": torch.ones(2)}))
    assert torch.equal(plain.enc, more.rows(range(32)).enc)


def test_settings_of_other_versions_are_nobodys_concern(tmp_path: Path) -> None:
    cfg = {"signed": False, "multi_topk": True, "batch_topk": False, "later": [1, 2]}
    assert open_sae(write_sparsify(tmp_path, cfg=cfg)).spec.k == 4
