"""Prisma's SAEs of vision transformers: always subtracted, layer norm where nothing is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.prisma import write_prisma

D, F, K = 16, 32, 4
ACTIVATIONS = [("standard", "relu"), ("standard", "tanh-relu"), ("standard", "topk"), ("gated", "relu")]


def literal(stored: dict[str, Tensor], x: Tensor, kind: tuple[str, str], norm: str, *, a: int = 1) -> Any:
    w = {name: value.double() for name, value in stored.items()}
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    length = x.norm(dim=-1, keepdim=True)
    seen = {"none": x, "layer_norm": (x - mean) / (std + 1e-5), "constant_norm_rescale": x * D**0.5 / length}[norm]
    dots = (seen - a * w["b_dec"]) @ w["W_enc"]
    match kind:
        case "gated", _:
            f = (dots + w["b_gate"] > 0) * (dots * w["r_mag"].exp() + w["b_mag"]).relu()
        case _, "topk":
            best = (dots + w["b_enc"]).topk(K, dim=-1)
            f = torch.zeros_like(dots).scatter(-1, best.indices, best.values.relu())
        case _, "tanh-relu":
            f = (dots + w["b_enc"]).relu().tanh()
        case _:
            f = (dots + w["b_enc"]).relu()
    out = f @ w["W_dec"] + w["b_dec"]
    scaled = {"none": out, "layer_norm": out * std + mean, "constant_norm_rescale": out * length / D**0.5}
    return f, scaled[norm]


@pytest.mark.parametrize("norm", ["layer_norm", "none", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_forward(tmp_path: Path, kind: tuple[str, str], norm: str) -> None:
    stored = write_prisma(
        tmp_path / "a", architecture=kind[0], activation_fn=kind[1], normalize_activations=norm, shuffled=True
    )
    sae, x = open_sae(tmp_path / "a"), tokens(D)
    assert_forward(sae, x, *literal(stored, x, kind, norm))
    assert (sae.spec.family, str(sae.spec.site), sae.spec.value_convention) == ("prisma", "resid_post.9", "raw")
    assert_converts(sae, tmp_path / "made")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("file", ["weights.pt", "n_images_2600058.pt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files(tmp_path: Path, dtype: torch.dtype, file: str, wrapped: bool) -> None:
    more = {"extra": torch.ones(2)}
    stored = write_prisma(tmp_path, file=file, wrapped=wrapped, dtype=dtype, expansion_factor=1, tensors=more)
    x = tokens(D)
    for place in (tmp_path, tmp_path / file):
        assert_forward(open_sae(place), x, *literal(stored, x, ACTIVATIONS[0], "layer_norm"))


def transcoder(stored: dict[str, Tensor], x: Tensor, norm: str, *, a: int = 1) -> tuple[Tensor, Tensor]:
    """Activations, and the reconstruction less the skip connection."""
    w = {name: value.double() for name, value in stored.items()}
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    seen = (x - mean) / (std + 1e-5) if norm == "layer_norm" else x
    f = ((seen - a * w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    out = f @ w["W_dec"] + w["b_dec_out"]
    return f, out * std + mean if norm == "layer_norm" else out


@pytest.mark.parametrize(("d_out", "skip"), [(D, True), (D, False), (24, False)])
@pytest.mark.parametrize("norm", ["layer_norm", "none"])
def test_transcoder(tmp_path: Path, norm: str, d_out: int, skip: bool) -> None:
    changes = {"layer_subtype": "hook_mlp_in"}
    stored = write_prisma(
        tmp_path / "a", d_out=d_out, skip=skip, normalize_activations=norm, config=changes, shuffled=True
    )
    sae, x = open_sae(tmp_path / "a"), tokens(D)
    assert_forward(sae, x, *transcoder(stored, x, norm))
    spec = sae.spec
    assert (str(spec.site), spec.d_out, spec.skip) == ("mlp_in.9->mlp_out.9", d_out, skip)
    assert not spec.subtracts_decoder_bias
    assert any("b_dec_out" in note for note in spec.notes)
    assert_converts(sae, tmp_path / "made")
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *transcoder(stored, x, norm, a=0))


@pytest.mark.parametrize("wrong", ["bias", "norm", "transposed"])
def test_wrong_readings_show(tmp_path: Path, wrong: str) -> None:
    stored = write_prisma(tmp_path, expansion_factor=1)
    sae, x = open_sae(tmp_path), tokens(D)
    if wrong == "transposed":
        stored["W_enc"] = stored["W_enc"].T
    literal_of = literal(stored, x, ACTIVATIONS[0], "none" if wrong == "norm" else "layer_norm", a=wrong != "bias")
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *literal_of)


def test_a_layer_norm_is_the_default(tmp_path: Path) -> None:
    write_prisma(tmp_path, config={"normalize_activations": DROP})
    assert open_sae(tmp_path).spec.input_norm.value == "layer_norm"


@pytest.mark.parametrize("key", ["cls_token_only", "use_patches_only"])
def test_what_it_was_trained_on_is_noted(tmp_path: Path, key: str) -> None:
    write_prisma(tmp_path, config={key: True})
    assert any(key in note for note in open_sae(tmp_path).spec.notes)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"architecture": "gated", "config": {"is_transcoder": True}}, UnsupportedCheckpoint, "no gated transcoder"),
        ({"config": {"is_transcoder": True, "d_out": D}}, CheckpointError, "lacks b_dec_out"),
        ({"d_out": 24, "skip": True}, CheckpointError, r"W_skip has the shape \[16, 16\].*\[24, 16\]"),
        ({"config": {"hook_point_head_index": 3}}, UnsupportedCheckpoint, "single attention head"),
        ({"config": {"hook_point_layer": [9]}}, CheckpointError, r"hook_point_layer is \[9\]"),
        ({"architecture": "jumprelu"}, UnsupportedCheckpoint, "architecture is 'jumprelu'"),
        ({"architecture": "gated", "activation_fn": "topk"}, UnsupportedCheckpoint, "known is relu"),
        ({"activation_fn": "leaky_relu"}, UnsupportedCheckpoint, "known is relu, tanh-relu, topk"),
        ({"normalize_activations": "batch"}, UnsupportedCheckpoint, "known are none, layer_norm"),
        ({"activation_fn": "topk", "config": {"activation_fn_kwargs": {}}}, CheckpointError, "k is None"),
        ({"activation_fn": "topk", "config": {"activation_fn_kwargs": {"k": 33}}}, CheckpointError, "k is 33"),
        (
            {"activation_fn": "topk", "config": {"activation_fn_kwargs": {"k": 3, "postact_fn": "Identity"}}},
            UnsupportedCheckpoint,
            "postact_fn is 'Identity'",
        ),
        ({"tensors": {"b_enc": DROP}}, CheckpointError, "lacks b_enc"),
        ({"tensors": {"W_enc": torch.ones(F, D)}}, CheckpointError, r"W_enc has the shape \[32, 16\]"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    write_prisma(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


class VisionModelSAERunnerConfig:
    """Stands for the configuration that the library pickles into ``weights.pt``."""


def test_a_pickled_configuration_is_refused_by_name(tmp_path: Path) -> None:
    stored = write_prisma(tmp_path, file="weights.pt")
    torch.save({"cfg": VisionModelSAERunnerConfig(), "state_dict": stored}, tmp_path / "weights.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"looks up .*VisionModelSAERunnerConfig"):
        open_sae(tmp_path)


def test_several_files_ask_for_one(tmp_path: Path) -> None:
    for file in ("n_images_1.pt", "n_images_2.pt"):
        write_prisma(tmp_path, file=file)
    with pytest.raises(UnsupportedCheckpoint, match=r"Name one: n_images_1\.pt, n_images_2\.pt"):
        open_sae(tmp_path)


def test_truncated(tmp_path: Path) -> None:
    write_prisma(tmp_path, file="weights.pt")
    path = tmp_path / "weights.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        open_sae(tmp_path)
