"""Llama Scope of 2024 and OpenMOSS' current layout, against their forward passes written out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae import Sae, open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.openmoss import HOOK, write_llama_scope, write_openmoss

D, F, K = 16, 32, 4
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def top(scores: Tensor, k: int = K) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)


def llama_scope(
    stored: dict[str, Tensor], x: Tensor, *, act_fn: str = "jumprelu", norm_in: float = 2.5, norm_out: float = 2.5
) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction as the release's own loader leaves the weights for inference."""
    w = {name: tensor.double() for name, tensor in stored.items()}
    c_in, c_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    enc, b_enc = w["encoder.weight"], w["encoder.bias"] / c_in
    dec, b_dec = w["decoder.weight"] * (c_in / c_out), w["decoder.bias"] / c_out
    norms = dec.norm(dim=0)
    enc, b_enc, dec = enc * norms[:, None], b_enc * norms, dec / norms
    pre = x @ enc.T + b_enc
    f = pre.relu() * {"jumprelu": pre > 0.52734375, "relu": pre > 0, "topk": top(pre)}[act_fn]
    return f, f @ dec.T + b_dec


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu", "topk"])
def test_llama_scope_forward(tmp_path: Path, act_fn: str, dtype: torch.dtype) -> None:
    changes = {"act_fn": act_fn} | ({"jump_relu_threshold": 0.0} if act_fn == "topk" else {})
    stored = write_llama_scope(tmp_path / "a", dtype=dtype, config=changes, shuffled=True)
    sae, x = open_sae(tmp_path / "a"), tokens(D)
    assert_forward(sae, x, *llama_scope(stored, x, act_fn=act_fn))
    assert (sae.spec.family, str(sae.spec.site), sae.spec.value_convention) == (
        "llama_scope",
        "resid_post.3",
        "decoder_norm",
    )
    assert sae.spec.k == (K if act_fn == "topk" else None)
    assert sae.spec.dtype == str(dtype).removeprefix("torch.")
    assert_converts(sae, tmp_path / "made")


def test_llama_scope_topk_with_a_threshold_is_jumprelu(tmp_path: Path) -> None:
    stored = write_llama_scope(tmp_path, config={"act_fn": "topk"})
    sae, x = open_sae(tmp_path), tokens(D)
    assert_forward(sae, x, *llama_scope(stored, x))
    assert any("taken for jumprelu at 0.52734375" in note for note in sae.spec.notes)


def test_llama_scope_transcoder_has_two_norms(tmp_path: Path) -> None:
    changes = {
        "hook_point_in": "blocks.3.ln2.hook_normalized",
        "hook_point_out": "blocks.3.hook_mlp_out",
        "dataset_average_activation_norm": {"in": 64.0, "out": 3.390625},
    }
    stored = write_llama_scope(tmp_path, config=changes)
    sae, x = open_sae(tmp_path), tokens(D) * 16
    literal = llama_scope(stored, x, norm_in=64.0, norm_out=3.390625)
    assert_forward(sae, x, *literal)
    assert sae.spec.site is None
    assert any("before the norm's gain" in note for note in sae.spec.notes)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *llama_scope(stored, x, norm_in=3.390625, norm_out=3.390625))


def test_llama_scope_without_a_decoder_bias_and_square(tmp_path: Path) -> None:
    stored = write_llama_scope(
        tmp_path,
        n_features=D,
        config={"use_decoder_bias": False},
        tensors={"decoder.bias": DROP, "more": torch.ones(3)},
    )
    sae, x = open_sae(tmp_path), tokens(D)
    assert_forward(sae, x, *llama_scope(stored | {"decoder.bias": torch.zeros(D)}, x))


def test_llama_scope_by_its_weights_file(tmp_path: Path) -> None:
    write_llama_scope(tmp_path)
    by_file = open_sae(tmp_path / "checkpoints" / "final.safetensors")
    assert by_file.fingerprint == open_sae(tmp_path).fingerprint


def wrong_threshold_scaled(stored: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Llama Scope as sae-lens reads it: no decoder norm in the gate."""
    w = {name: tensor.double() for name, tensor in stored.items()}
    c = math.sqrt(D) / 2.5
    pre = x @ w["encoder.weight"].T + w["encoder.bias"] / c
    norms = w["decoder.weight"].norm(dim=0)
    f = pre * (pre > 0.52734375) * norms
    return f, f @ (w["decoder.weight"] / norms).T + w["decoder.bias"] / c


def test_the_readings_of_llama_scope_differ(tmp_path: Path) -> None:
    stored = write_llama_scope(tmp_path)
    sae, x = open_sae(tmp_path), tokens(D)
    with pytest.raises(AssertionError, match="not close"):  # sae-lens agrees for unit decoder rows only
        assert_forward(sae, x, *wrong_threshold_scaled(stored, x))
    with pytest.raises(AssertionError, match="not close"):  # the norm not folded
        assert_forward(sae, x, *llama_scope(stored, x, norm_in=math.sqrt(D), norm_out=math.sqrt(D)))
    with pytest.raises(AssertionError, match="not close"):  # the decoder bias subtracted
        assert_forward(sae, x, *llama_scope(stored, x - stored["decoder.bias"].double()))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"config": {"use_glu_encoder": True}}, UnsupportedCheckpoint, "use_glu_encoder is True"),
        ({"config": {"apply_decoder_bias_to_pre_encoder": True}}, UnsupportedCheckpoint, "no release"),
        ({"config": {"act_fn": "gelu"}}, UnsupportedCheckpoint, "act_fn is 'gelu'.*known are jumprelu"),
        ({"config": {"act_fn": DROP}}, UnsupportedCheckpoint, "act_fn is None"),
        ({"config": {"norm_activation": "token-wise"}}, UnsupportedCheckpoint, "'token-wise'.*dataset-wise"),
        ({"config": {"jump_relu_threshold": -0.5}}, UnsupportedCheckpoint, "keeps negative"),
        ({"config": {"jump_relu_threshold": DROP}}, CheckpointError, "jump_relu_threshold is None"),
        ({"config": {"dataset_average_activation_norm": DROP}}, CheckpointError, "in is None; needed is a finite"),
        ({"config": {"dataset_average_activation_norm": {"in": 0, "out": 1}}}, CheckpointError, "positive"),
        ({"config": {"d_sae": 31}}, CheckpointError, r"shape \[.*by hyperparams\.json"),
        ({"config": {"act_fn": "topk", "jump_relu_threshold": 0, "top_k": 99}}, CheckpointError, "top_k is 99"),
        ({"tensors": {"decoder.bias": DROP}}, CheckpointError, r"lacks decoder\.bias"),
        ({"tensors": {"encoder.weight": torch.ones(D, F)}}, CheckpointError, r"\[16, 32\].*\[32, 16\]"),
        ({"tensors": {"encoder.bias": torch.ones(F, dtype=torch.int8)}}, UnsupportedCheckpoint, "torch.int8"),
    ],
)
def test_llama_scope_refused(tmp_path: Path, arguments: Any, kind: type[Exception], message: str) -> None:
    write_llama_scope(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def openmoss(stored: dict[str, Tensor], x: Tensor, *, act_fn: str = "jumprelu", c: float | None = None) -> Any:
    """Activations and reconstruction of the library's own forward, in training mode: nothing folded."""
    w = {name: tensor.double() for name, tensor in stored.items()}
    if "encoder.weight" in w:
        w["W_E"], w["W_D"] = w["encoder.weight"].T, w["decoder.weight"].T
        w["b_E"], w["b_D"] = w["encoder.bias"], w["decoder.bias"]
        w["activation_function.log_jumprelu_threshold"] = w.get("log_jumprelu_threshold", torch.zeros(F).double())
    c = math.sqrt(D) / 2.5 if c is None else c
    norms = w["W_D"].norm(dim=1)
    pre = (c * x) @ w["W_E"] + w["b_E"]
    scored = pre * norms
    if act_fn == "jumprelu":
        scored = scored * (scored > w["activation_function.log_jumprelu_threshold"].exp())
    elif act_fn == "topk":
        scored = scored.relu() * top(scored.relu())
    else:
        scored = scored.relu()
    f = scored / norms
    return f, (f @ w["W_D"] + w["b_D"]) / c


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "sae_weights.pt"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu"])
def test_openmoss_forward(tmp_path: Path, act_fn: str, layout: str, dtype: torch.dtype, file: str) -> None:
    stored = write_openmoss(tmp_path / "a", act_fn=act_fn, layout=layout, dtype=dtype, file=file, shuffled=True)
    sae, x = open_sae(tmp_path / "a"), tokens(D)
    assert_forward(sae, x, *openmoss(stored, x, act_fn=act_fn))
    assert (sae.spec.family, str(sae.spec.site), sae.spec.value_convention) == ("openmoss", "resid_post.3", "raw")
    assert_converts(sae, tmp_path / "made")


@pytest.mark.parametrize("act_fn", ["jumprelu", "relu"])
def test_openmoss_inference_weights_are_taken_as_they_are(tmp_path: Path, act_fn: str) -> None:
    # The library stores whatever was in memory for norms that it does not use.
    norm = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(math.nan)}
    stored = write_openmoss(tmp_path, norm_activation="inference", act_fn=act_fn, tensors=norm)
    sae, x = open_sae(tmp_path), tokens(D)
    assert_forward(sae, x, *openmoss(stored, x, act_fn=act_fn, c=1.0))


def test_openmoss_topk_ranks_by_decoder_norms(tmp_path: Path) -> None:
    stored = write_openmoss(tmp_path / "a", act_fn="topk", n_features=D)
    sae, x = open_sae(tmp_path / "a"), tokens(D)
    f, decoded = openmoss(stored, x, act_fn="topk")
    assert sae.spec.value_convention == "decoder_norm"
    norms = stored["W_D"].double().norm(dim=1) / (math.sqrt(D) / 2.5)
    assert_forward(sae, x, f * norms, decoded)
    assert_converts(sae, tmp_path / "made")


def test_openmoss_without_decoder_norms_in_the_gate(tmp_path: Path) -> None:
    stored = write_openmoss(tmp_path, config={"sparsity_include_decoder_norm": False})
    sae, x = open_sae(tmp_path), tokens(D)
    c = math.sqrt(D) / 2.5
    pre = (c * x) @ stored["W_E"].double() + stored["b_E"].double()
    f = pre * (pre > stored["activation_function.log_jumprelu_threshold"].double().exp())
    assert_forward(sae, x, f, (f @ stored["W_D"].double() + stored["b_D"].double()) / c)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *openmoss(stored, x))


def test_openmoss_a_decoder_row_of_zeros_never_fires(tmp_path: Path) -> None:
    first = write_openmoss(tmp_path)
    dec = first["W_D"].clone()
    dec[5] = 0
    write_openmoss(tmp_path, tensors={"W_D": dec})
    rows = open_sae(tmp_path).rows([5])
    assert float(rows.theta) == torch.finfo(torch.float32).max


def _make(path: Path) -> None:
    (path / "sae_weights.safetensors").unlink()
    (path / "sae_weights.dcp").mkdir()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"config": {"sae_type": "clt"}}, UnsupportedCheckpoint, "cross-layer transcoder"),
        ({"config": {"sae_type": "lorsa"}}, UnsupportedCheckpoint, "attention heads"),
        ({"config": {"sae_type": "mystery"}}, UnsupportedCheckpoint, "known is sae"),
        ({"config": {"use_glu_encoder": True}}, UnsupportedCheckpoint, "GLU encoder"),
        ({"tensors": {"W_E_glu": torch.ones(D, F)}}, UnsupportedCheckpoint, "GLU encoder"),
        ({"act_fn": "batchtopk"}, UnsupportedCheckpoint, "depends on the batch"),
        ({"act_fn": "layertopk"}, UnsupportedCheckpoint, "'layertopk'.*known are relu"),
        ({"norm_activation": "batch-wise"}, UnsupportedCheckpoint, "batch-wise"),
        (
            {"tensors": {f"dataset_average_activation_norm.{HOOK}": DROP}},
            UnsupportedCheckpoint,
            "lacks dataset_average_activation_norm.blocks.3",
        ),
        (
            {"tensors": {f"dataset_average_activation_norm.{HOOK}": torch.tensor(math.nan)}},
            CheckpointError,
            "needed is one positive number",
        ),
        (
            {"tensors": {"activation_function.log_jumprelu_threshold": DROP}},
            CheckpointError,
            "lacks activation_function",
        ),
        ({"tensors": {"W_D": torch.ones(D, F)}}, CheckpointError, r"W_D has the shape \[16, 32\]"),
        ({"act_fn": "topk", "config": {"top_k": 33}}, CheckpointError, "top_k is 33"),
    ],
)
def test_openmoss_refused(tmp_path: Path, arguments: Any, kind: type[Exception], message: str) -> None:
    write_openmoss(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_openmoss_distributed_checkpoints_are_refused(tmp_path: Path) -> None:
    write_openmoss(tmp_path)
    _make(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=r"sae_weights\.dcp is a distributed checkpoint"):
        open_sae(tmp_path)


@pytest.mark.parametrize("write", [write_llama_scope, write_openmoss])
def test_truncated(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_sae(tmp_path)


def test_old_and_new_layout_are_one_dictionary(tmp_path: Path) -> None:
    saes: list[Sae] = []
    for layout in ("old", "new"):
        write_openmoss(tmp_path / layout, layout=layout)
        saes.append(open_sae(tmp_path / layout))
    for name in ("enc", "dec", "bias", "theta"):
        assert torch.equal(*(getattr(sae.rows(range(F)), name) for sae in saes))


def test_fingerprints_follow_what_the_configuration_says(tmp_path: Path) -> None:
    found = []
    for i, changes in enumerate(
        (
            {},
            {"jump_relu_threshold": 0.25},
            {"dataset_average_activation_norm": {"in": 3.0, "out": 3.0}},
            {"sparsity_include_decoder_norm": False},
        )
    ):
        write_llama_scope(tmp_path / f"l{i}", config=changes)
        found.append(open_sae(tmp_path / f"l{i}").fingerprint)
    for i, changes in enumerate(({}, {"sparsity_include_decoder_norm": False}, {"norm_activation": "inference"})):
        write_openmoss(tmp_path / f"o{i}", config=changes)
        found.append(open_sae(tmp_path / f"o{i}").fingerprint)
    write_openmoss(tmp_path / "again", config={"learning_rate": 3})
    assert open_sae(tmp_path / "again").fingerprint == found[4]
    assert len(set(found)) == len(found)
