"""SAELens files: canonical rows compute what the raw tensors do, whatever the version, dtype and normalisation."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sae_steer.errors import CheckpointError, UnknownFeature
from sae_steer.sae import Activation, FeatureRows, InputNorm, Sae, open_sae
from tests.sae_files import DROP, SAELENS_ARCHITECTURES, write_saelens
from tests.sae_forward import encode

SAES = [name for name in SAELENS_ARCHITECTURES if not name.endswith("transcoder")]
TRANSCODERS = [name for name in SAELENS_ARCHITECTURES if name.endswith("transcoder")]


def literal_norm(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """N(x) and the scale that undoes it, as sae-lens writes them: [T, D] and [T, 1]."""
    one = torch.ones(len(x), 1, dtype=x.dtype)
    match name:
        case "none":
            return x, one
        case "center":
            return x - x.mean(-1, keepdim=True), one
        case "layer_norm":
            centred = x - x.mean(-1, keepdim=True)
            std = centred.std(-1, keepdim=True)
            return centred / (std + 1e-5), std
        case "constant_norm_rescale":
            factor = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)
            return x * factor, 1 / factor
    raise AssertionError(name)


def literal_encode(
    raw: dict[str, Tensor], x: Tensor, architecture: str, *, a: int, norm: str = "none", k: int = 0
) -> Tensor:
    """Activations [T, F] from the file's own tensors, in float64, feature by feature as the formulas stand."""
    seen = literal_norm(x, norm)[0] - a * raw["b_dec"] if a else literal_norm(x, norm)[0]
    if architecture == "gated":
        gate = seen @ raw["W_enc"] + raw["b_gate"]
        magnitude = seen @ (raw["W_enc"] * raw["r_mag"].exp()) + raw["b_mag"]
        return (gate > 0) * magnitude.relu()
    pre = seen @ raw["W_enc"] + raw["b_enc"]
    if architecture.startswith("jumprelu"):
        return pre.relu() * (pre > raw["threshold"])
    if architecture == "topk":
        kept = torch.zeros_like(pre)
        best = pre.topk(k, dim=-1)
        return kept.scatter(-1, best.indices, best.values.relu())
    if architecture == "tanh-relu":
        return pre.relu().tanh()
    return pre.relu()


def assert_forward(sae: Sae, literal: Tensor, x: Tensor) -> None:
    """Equal up to the one rounding to float32, except where a gate is within that rounding of its edge."""
    spec = sae.spec
    found = encode(spec, sae.rows(range(spec.n_features)), x)
    assert literal.count_nonzero() > 0
    torch.testing.assert_close(found, literal, rtol=1e-5, atol=1e-5)


def tokens(width: int, count: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * 2 + 0.7


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", SAES)
def test_forward(tmp_path: Path, architecture: str, subtract: bool, norm: str) -> None:
    write_saelens(tmp_path, architecture=architecture, normalize_activations=norm, apply_b_dec_to_input=subtract)
    sae, x = open_sae(tmp_path), tokens(16)
    assert sae.spec.subtracts_decoder_bias is subtract
    assert_forward(sae, literal_encode(sae.raw(), x, architecture, a=subtract, norm=norm, k=4), x)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoder(tmp_path: Path, architecture: str) -> None:
    written = write_saelens(tmp_path, architecture=architecture, d_in=16, d_out=24)
    sae, x = open_sae(tmp_path), tokens(16)
    assert_forward(sae, literal_encode(sae.raw(), x, architecture, a=0), x)
    assert (sae.spec.d_in, sae.spec.d_out, str(sae.spec.site)) == (16, 24, "mlp_in.2->mlp_out.2")
    assert torch.equal(sae.rows([5, 2]).dec, written["W_dec"][[5, 2]])
    assert torch.equal(sae.decoder_bias(), written["b_dec"])
    assert any("W_skip" in note for note in sae.spec.notes) == ("skip" in architecture)


def test_tanh_relu_of_old_files(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="standard", version="5", activation_fn="tanh-relu")
    sae, x = open_sae(tmp_path), tokens(16)
    assert sae.spec.activation is Activation.TANH_RELU
    assert_forward(sae, literal_encode(sae.raw(), x, "tanh-relu", a=1), x)


def test_centred_weights(tmp_path: Path) -> None:
    kwargs = {"center_writing_weights": True}
    write_saelens(tmp_path / "a", architecture="standard", model_from_pretrained_kwargs=kwargs)
    sae, x = open_sae(tmp_path / "a"), tokens(16)
    assert sae.spec.input_norm is InputNorm.CENTER
    literal = literal_encode(sae.raw(), x, "standard", a=1, norm="center")
    assert_forward(sae, literal, x)
    with pytest.raises(AssertionError):
        assert_forward(sae, literal_encode(sae.raw(), x, "standard", a=1), x)
    write_saelens(tmp_path / "b", normalize_activations="layer_norm", model_from_pretrained_kwargs=kwargs)
    assert open_sae(tmp_path / "b").spec.input_norm is InputNorm.LAYER_NORM
    write_saelens(tmp_path / "c", hook_name="blocks.1.attn.hook_z", model_from_pretrained_kwargs=kwargs)
    assert open_sae(tmp_path / "c").spec.input_norm is InputNorm.NONE
    write_saelens(tmp_path / "d", model_from_pretrained_kwargs={"center_writing_weights": False})
    assert open_sae(tmp_path / "d").spec.input_norm is InputNorm.NONE


def test_topk_in_units_of_decoder_norms(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="topk", cfg={"rescale_acts_by_decoder_norm": True})
    sae, x = open_sae(tmp_path), tokens(16)
    raw = sae.raw()
    norm = raw["W_dec"].norm(dim=-1)
    pre = ((x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]) * norm
    best = pre.topk(4, dim=-1)
    literal = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    assert_forward(sae, literal, x)
    rows = sae.rows(range(32))
    decoded = encode(sae.spec, rows, x) @ rows.dec.double()
    torch.testing.assert_close(decoded, (literal / norm) @ raw["W_dec"], rtol=1e-5, atol=1e-5)
    assert sae.spec.value_convention == "decoder_norm"

    write_saelens(tmp_path / "plain", architecture="topk")
    plain = open_sae(tmp_path / "plain")
    assert plain.spec.value_convention == "raw"
    assert plain.fingerprint != sae.fingerprint, "the same bytes with another meaning are another dictionary"
    with pytest.raises(AssertionError):
        assert_forward(plain, literal, x)


@pytest.mark.parametrize("architecture", SAES)
def test_the_input_scaling_that_training_checkpoints_keep_beside(tmp_path: Path, architecture: str) -> None:
    write_saelens(tmp_path, architecture=architecture, normalize_activations="expected_average_only_in")
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    sae, x = open_sae(tmp_path), tokens(16)
    literal = literal_encode(sae.raw(), x * 0.25, architecture, a=1, k=4)
    assert_forward(sae, literal, x)
    decoded = literal @ sae.raw()["W_dec"] / 0.25 + sae.raw()["b_dec"] / 0.25
    rows = sae.rows(range(32))
    found = encode(sae.spec, rows, x) @ rows.dec.double() + sae.decoder_bias()
    torch.testing.assert_close(found, decoded, rtol=1e-5, atol=1e-5)
    assert any("scaled by 0.25" in note for note in sae.spec.notes)
    with pytest.raises(AssertionError):
        assert_forward(sae, literal_encode(sae.raw(), x, architecture, a=1, k=4), x)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    assert open_sae(tmp_path).fingerprint != sae.fingerprint


@pytest.mark.parametrize(
    ("scaler", "message"),
    [
        ({"scaling_factor": None}, "factor is not in the files"),
        ({}, "factor is not in the files"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0; needed is a positive number"),
        ({"scaling_factor": "1"}, "scaling_factor is '1'"),
    ],
)
def test_an_input_scaling_that_is_not_said(tmp_path: Path, scaler: dict, message: str) -> None:
    write_saelens(tmp_path, normalize_activations="expected_average_only_in")
    (tmp_path / "activation_scaler.json").write_text(json.dumps(scaler))
    with pytest.raises(CheckpointError, match=message):
        open_sae(tmp_path)


def test_a_transcoder_with_an_input_scaling_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="transcoder", normalize_activations="expected_average_only_in")
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    with pytest.raises(CheckpointError, match="normalize_activations is 'expected_average_only_in', which is refused"):
        open_sae(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "site"),
    [
        ({"hook_name": "odd", "hf_hook_name": "model.layers.4"}, "resid_post.4"),
        ({"hf_hook_name": "model.layers.4.self_attn.o_proj.input"}, "z.4"),
        ({"hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "model.layers.4"}, "resid_post.3"),
        ({"hook_name": "odd", "hf_hook_name": "model.norm"}, "None"),
    ],
)
def test_module_paths_where_hook_names_do_not_tell(tmp_path: Path, metadata: dict, site: str) -> None:
    write_saelens(tmp_path, cfg={"metadata": metadata})
    assert str(open_sae(tmp_path).spec.site) == site


def test_a_transcoder_by_module_paths(tmp_path: Path) -> None:
    paths = [f"model.layers.4.{side}_feedforward_layernorm.output" for side in ("pre", "post")]
    metadata = {
        "hook_name": "blocks.4.ln2.hook_normalized",
        "hook_name_out": "blocks.4.hook_mlp_out",
        "hf_hook_name": paths[0],
        "hf_hook_name_out": paths[1],
    }
    write_saelens(tmp_path, architecture="jumprelu_transcoder", cfg={"metadata": metadata})
    assert str(open_sae(tmp_path).spec.site) == "mlp_in.4->mlp_out.4"


def test_a_skip_connection_cannot_be_dropped_with_the_error(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a", architecture="skip_transcoder")
    write_saelens(tmp_path / "b", architecture="transcoder")
    assert (open_sae(tmp_path / "a").spec.skip, open_sae(tmp_path / "b").spec.skip) == (True, False)


def test_topk_row_of_zeros_in_units_of_decoder_norms(tmp_path: Path) -> None:
    dec = torch.randn(32, 16)
    dec[3] = 0
    write_saelens(tmp_path, architecture="topk", tensors={"W_dec": dec}, cfg={"rescale_acts_by_decoder_norm": True})
    row = open_sae(tmp_path).rows([3])
    assert not row.dec.any()
    assert not row.enc.any()


def test_log_threshold(tmp_path: Path) -> None:
    log = torch.linspace(-2, 1, 32)
    write_saelens(tmp_path, tensors={"threshold": DROP, "log_threshold": log})
    sae = open_sae(tmp_path)
    assert torch.equal(sae.rows(range(32)).theta, log.double().exp().float())
    assert any("log_threshold" in note for note in sae.spec.notes)


@pytest.mark.parametrize("theta", [-1.0, 0.0])
def test_jumprelu_is_strict_and_never_negative(tmp_path: Path, theta: float) -> None:
    # A threshold of -1 is what a BatchTopK whose threshold was never trained saves: plain ReLU.
    zero, one = torch.zeros(2, 2), torch.eye(2)
    write_saelens(
        tmp_path,
        d_in=2,
        n_features=2,
        tensors={"W_enc": one, "W_dec": one, "b_enc": zero[0], "b_dec": zero[0], "threshold": zero[0] + theta},
    )
    sae = open_sae(tmp_path)
    x = torch.tensor([[-0.5, 0.0], [0.25, 2.0]], dtype=torch.float64)
    assert torch.equal(encode(sae.spec, sae.rows([0, 1]), x), x.relu())


@pytest.mark.parametrize("architecture", SAES)
def test_forgetting_the_decoder_bias_shows(tmp_path: Path, architecture: str) -> None:
    write_saelens(tmp_path, architecture=architecture)
    sae, x = open_sae(tmp_path), tokens(16)
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, literal_encode(sae.raw(), x, architecture, a=0, k=4), x)


@pytest.mark.parametrize("wrong", ["biased std", "eps inside", "no sum"])
def test_wrong_layer_norms_show(tmp_path: Path, wrong: str) -> None:
    write_saelens(tmp_path, architecture="standard", normalize_activations="layer_norm")
    sae, x = open_sae(tmp_path), tokens(16) * 1e-3  # small, so that the eps matters
    rows = sae.rows(range(32))
    centred = x - x.mean(-1, keepdim=True)
    seen = {
        "biased std": centred / (x.std(-1, keepdim=True, unbiased=False) + 1e-5),
        "eps inside": centred / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
        "no sum": x / (x.std(-1, keepdim=True) + 1e-5),
    }[wrong]
    bad = (seen @ rows.enc.double().T + rows.bias.double()).relu()
    good = literal_encode(sae.raw(), x, "standard", a=1, norm="layer_norm")
    assert_forward(sae, good, x)
    assert not torch.allclose(bad, good, rtol=1e-4, atol=1e-4)


@given(
    architecture=st.sampled_from(SAES),
    version=st.sampled_from(["2", "5", "6"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    norm=st.sampled_from(["none", "layer_norm", "constant_norm_rescale"]),
    d_in=st.integers(2, 40),
    n_features=st.integers(1, 40),
    square=st.booleans(),
    data=st.data(),
)
def test_rows_of_any_ids(
    tmp_path_factory: pytest.TempPathFactory,
    architecture: str,
    version: str,
    dtype: torch.dtype,
    norm: str,
    d_in: int,
    n_features: int,
    square: bool,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("sae")
    n_features = d_in if square else n_features  # W_enc and W_dec then have one shape
    ids = data.draw(st.lists(st.integers(0, n_features - 1), max_size=12))  # in any order, repeated, none at all
    k = data.draw(st.integers(1, n_features))
    written = write_saelens(
        folder,
        architecture=architecture,
        version=version,
        dtype=dtype,
        normalize_activations=norm,
        d_in=d_in,
        n_features=n_features,
        k=k,
    )
    sae = open_sae(folder)
    every, some = sae.rows(range(n_features)), sae.rows(ids)
    for field in dataclasses.fields(FeatureRows):
        whole, part = getattr(every, field.name), getattr(some, field.name)
        assert torch.equal(whole[ids], part), field.name
        assert part.is_contiguous()
        assert part.dtype == (torch.int64 if field.name == "ids" else torch.float32)
    assert torch.equal(every.enc, written["W_enc"].T.float())
    assert torch.equal(every.dec, written["W_dec"].float())
    assert sae.spec.dtype == str(dtype).removeprefix("torch.")

    x = tokens(d_in, count=8)
    literal = literal_encode(sae.raw(), x, architecture, a=1, norm=norm, k=k)
    found = encode(sae.spec, every, x)
    # A pre-activation within rounding of its threshold may fall on either side.
    close = torch.isclose(found, literal, rtol=1e-4, atol=1e-4)
    assert (~close).sum() <= 1


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_folds_are_float64_and_do_not_depend_on_the_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    d_in, n_features = 768, 300
    large = torch.randn(d_in) * 1e4  # the fold then cancels nearly all digits of a float32
    write_saelens(tmp_path, architecture=architecture, d_in=d_in, n_features=n_features, tensors={"b_dec": large})
    sae = open_sae(tmp_path)
    raw, every = sae.raw(), sae.rows(range(n_features))
    exact = raw["b_gate" if architecture == "gated" else "b_enc"] - raw["b_dec"] @ raw["W_enc"]
    torch.testing.assert_close(every.bias.double(), exact, rtol=1e-7, atol=1e-6)
    for field in dataclasses.fields(FeatureRows):
        whole = getattr(every, field.name)
        single = torch.cat([getattr(sae.rows([feature]), field.name) for feature in range(n_features)])
        assert torch.equal(whole, single), field.name
    monkeypatch.setattr("sae_steer.sae.weights.BLOCK", 7)
    assert torch.equal(sae.rows(range(n_features)).bias, every.bias)


@pytest.mark.parametrize("architecture", SAES)
def test_versions_agree(tmp_path: Path, architecture: str) -> None:
    for version in ("2", "5", "6"):
        write_saelens(tmp_path / version, architecture=architecture, version=version)
    old, flat, new = (open_sae(tmp_path / version) for version in ("2", "5", "6"))
    assert old.spec == flat.spec == new.spec
    assert old.fingerprint == flat.fingerprint == new.fingerprint


def test_the_oldest_defaults(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="standard", version="2", normalize_activations=False)
    spec = open_sae(tmp_path).spec
    keys = json.loads((tmp_path / "cfg.json").read_text())
    assert "hook_point" in keys
    assert not {"architecture", "apply_b_dec_to_input", "hook_name"} & keys.keys()
    assert (spec.activation, spec.subtracts_decoder_bias) == (Activation.RELU, True)
    assert spec.input_norm is InputNorm.NONE
    assert str(spec.site) == "resid_post.2"


def test_fingerprint_follows_weights_and_meaning(tmp_path: Path) -> None:
    first = write_saelens(tmp_path / "a")
    write_saelens(tmp_path / "b")
    write_saelens(tmp_path / "c", apply_b_dec_to_input=False)
    write_saelens(tmp_path / "d", tensors={"b_enc": first["b_enc"] + 1})
    write_saelens(tmp_path / "e", cfg={"l1_coefficient": 5, "training": [1, {"deep": None}]})
    a, b, c, d, e = (open_sae(tmp_path / name).fingerprint for name in "abcde")
    assert a == b == e
    assert len({a, c, d}) == 3
    assert a.startswith("sha256:")
    assert len(a) == len("sha256:") + 64


def test_a_stored_type_other_than_claimed_is_noted(tmp_path: Path) -> None:
    write_saelens(tmp_path, dtype=torch.bfloat16, cfg={"dtype": "torch.float32"})
    spec = open_sae(tmp_path).spec
    assert spec.dtype == "bfloat16"
    assert any("stored as bfloat16" in note for note in spec.notes)


def test_raw_is_the_file(tmp_path: Path) -> None:
    written = write_saelens(tmp_path, dtype=torch.float16)
    raw = open_sae(tmp_path).raw()
    assert raw.keys() == written.keys()
    for name, tensor in written.items():
        assert raw[name].dtype == torch.float64
        assert torch.equal(raw[name], tensor.double())


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.0.hook_mlp_out", "mlp_out.0"),
        ("blocks.11.hook_attn_out", "attn_out.11"),
        ("blocks.7.attn.hook_z", "z.7"),
    ],
)
def test_sites(tmp_path: Path, hook: str, site: str) -> None:
    for version in ("2", "6"):
        write_saelens(tmp_path / version, hook_name=hook, version=version)
        assert str(open_sae(tmp_path / version).spec.site) == site


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ({"hook_name": "hook_embed"}, "hook_embed"),
        ({"architecture": "transcoder", "hook_name": "blocks.2.ln2.hook_normalized"}, "before the norm's gain"),
        ({"architecture": "transcoder", "hook_name_out": None}, "do not say"),
        ({"cfg": {"metadata": {}}}, "do not say"),
    ],
)
def test_a_site_that_cannot_be_told_is_left_to_the_user(tmp_path: Path, arguments: dict, note: str) -> None:
    write_saelens(tmp_path, **arguments)
    spec = open_sae(tmp_path).spec
    assert spec.site is None
    assert any(note in text for text in spec.notes)


@pytest.mark.parametrize("feature", [-1, 32, 2**70])
def test_unknown_feature(tmp_path: Path, feature: int) -> None:
    write_saelens(tmp_path)
    with pytest.raises(UnknownFeature, match=f"no feature {feature}.*0 to 31"):
        open_sae(tmp_path).rows([0, feature])


def test_weights_that_are_not_finite_only_refuse_their_own_rows(tmp_path: Path) -> None:
    written = write_saelens(tmp_path / "a")
    for name, index in (("W_enc", (3, 7)), ("W_dec", (7, 3)), ("b_enc", 7), ("threshold", 7)):
        damaged = written[name].clone()
        damaged[index] = math.inf
        write_saelens(tmp_path / name, tensors={name: damaged})
        sae = open_sae(tmp_path / name)
        assert sae.rows([6, 8]).enc.isfinite().all()
        with pytest.raises(CheckpointError, match=r"features \[7\] are not finite"):
            sae.rows([6, 7])
    write_saelens(tmp_path / "big", architecture="gated", tensors={"r_mag": torch.full((32,), 100.0)})
    with pytest.raises(CheckpointError, match="mag_scale"):
        open_sae(tmp_path / "big").rows([0])
    write_saelens(tmp_path / "bias", apply_b_dec_to_input=False, tensors={"b_dec": torch.full((16,), math.nan)})
    with pytest.raises(CheckpointError, match="decoder bias"):
        open_sae(tmp_path / "bias").decoder_bias()


def test_rows_do_not_load_the_dictionary(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("private memory is read from /proc, which is Linux's")

    def private() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    d_in, n_features = 64, 2**18
    width = d_in * n_features * 4
    write_saelens(tmp_path, architecture="standard", d_in=d_in, n_features=1)
    save_file(
        {
            "W_enc": torch.zeros(d_in, n_features),
            "W_dec": torch.zeros(n_features, d_in),
            "b_enc": torch.zeros(n_features),
            "b_dec": torch.zeros(d_in),
        },
        tmp_path / "sae_weights.safetensors",
    )
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "d_sae": n_features}))
    before = private()
    rows = open_sae(tmp_path).rows(range(0, n_features, n_features // 64))
    assert len(rows.ids) == 64
    assert private() - before < width // 4
