"""dictionary_learning: each class as its own code computes it, its look-alikes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae import Activation, open_sae
from tests.sae_files import DROP
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.dictionary_learning import CLASSES, write_dictionary_learning

SUBTRACTING = [name for name in CLASSES if name not in ("AutoEncoderNew", "JumpReluAutoEncoder")]
ROUND = 32


def forward(raw: dict[str, Tensor], x: Tensor, dict_class: str, k: int = 4) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction, in float64, line by line as the class writes them."""
    raw = {name: tensor.double() for name, tensor in raw.items()}
    match dict_class:
        case "AutoEncoder":
            f = ((x - raw["bias"]) @ raw["encoder.weight"].T + raw["encoder.bias"]).relu()
            return f, f @ raw["decoder.weight"].T + raw["bias"]
        case "AutoEncoderNew":
            f = (x @ raw["encoder.weight"].T + raw["encoder.bias"]).relu()
            return f, f @ raw["decoder.weight"].T + raw["decoder.bias"]
        case "GatedAutoEncoder":
            dots = (x - raw["decoder_bias"]) @ raw["encoder.weight"].T
            f = (dots + raw["gate_bias"] > 0) * (raw["r_mag"].exp() * dots + raw["mag_bias"]).relu()
            return f, f @ raw["decoder.weight"].T + raw["decoder_bias"]
        case "JumpReluAutoEncoder":
            pre = x @ raw["W_enc"] + raw["b_enc"]
            f = (pre * (pre > raw["threshold"])).relu()
            return f, f @ raw["W_dec"] + raw["b_dec"]
        case "AutoEncoderTopK":
            post = ((x - raw["b_dec"]) @ raw["encoder.weight"].T + raw["encoder.bias"]).relu()
            best = post.topk(k, dim=-1)
            f = torch.zeros_like(post).scatter(-1, best.indices, best.values)
            return f, f @ raw["decoder.weight"].T + raw["b_dec"]
        case "BatchTopKSAE":
            post = ((x - raw["b_dec"]) @ raw["encoder.weight"].T + raw["encoder.bias"]).relu()
            f = post * (post > raw["threshold"])
            return f, f @ raw["decoder.weight"].T + raw["b_dec"]
        case _:
            post = ((x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]).relu()
            f = post * (post > raw["threshold"])
            return f, f @ raw["W_dec"] + raw["b_dec"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [16, ROUND])
@pytest.mark.parametrize("dict_class", CLASSES)
def test_forward(tmp_path: Path, dict_class: str, d_in: int, dtype: torch.dtype) -> None:
    written = write_dictionary_learning(tmp_path, dict_class=dict_class, d_in=d_in, n_features=ROUND, dtype=dtype)
    sae, x = open_sae(tmp_path), tokens(d_in)
    assert (sae.spec.family, sae.spec.architecture) == ("dictionary_learning", dict_class)
    assert (sae.spec.n_features, sae.spec.d_in, sae.spec.d_out) == (ROUND, d_in, d_in)
    assert sae.spec.dtype == str(dtype).removeprefix("torch.")
    assert sae.spec.subtracts_decoder_bias is (dict_class in SUBTRACTING)
    assert (str(sae.spec.site), sae.spec.model_name) == ("resid_post.3", "EleutherAI/pythia-70m")
    assert_forward(sae, x, *forward(written, x, dict_class))
    if d_in == 16 and dtype == torch.float32:
        assert_converts(sae, tmp_path / "converted")


@pytest.mark.parametrize("dict_class", CLASSES)
@pytest.mark.parametrize("wrong", ["bias sign", "bias", "transposed"])
def test_wrong_forwards_show(tmp_path: Path, dict_class: str, wrong: str) -> None:
    written = write_dictionary_learning(tmp_path, dict_class=dict_class, d_in=ROUND, n_features=ROUND)
    sae, x = open_sae(tmp_path), tokens(ROUND)
    bias = next(name for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in written)
    matrix = "W_enc" if "W_enc" in written else "encoder.weight"
    spoilt = {
        "bias sign": {bias: -written[bias]},
        "bias": {bias: written[bias] * 0},
        "transposed": {matrix: written[matrix].T},
    }[wrong]
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *forward(written | spoilt, x, dict_class))


def test_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path, file="checkpoints/ae_1000.pt")
    write_dictionary_learning(tmp_path, file="checkpoints/ae_2000.pt", seed=1)
    first, second = (open_sae(tmp_path / "checkpoints" / f"ae_{n}000.pt") for n in (1, 2))
    assert str(first.spec.site) == "resid_post.3"
    assert first.path == tmp_path / "checkpoints" / "ae_1000.pt"
    assert first.fingerprint != second.fingerprint
    with pytest.raises(UnsupportedCheckpoint, match=r"Name one: ae_1000\.pt, ae_2000\.pt"):
        open_sae(tmp_path / "checkpoints")


def test_other_files_beside_the_one_that_a_run_ends_with(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x02.")
    assert open_sae(tmp_path).spec.architecture == "AutoEncoder"


def test_order_and_other_keys_change_nothing(tmp_path: Path) -> None:
    written = write_dictionary_learning(tmp_path / "a")
    turned = dict(reversed(written.items())) | {"steps": torch.tensor(3), "optimizer": {"lr": 0.1}}
    (tmp_path / "b").mkdir()
    torch.save(turned, tmp_path / "b" / "ae.pt")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    a, b = open_sae(tmp_path / "a"), open_sae(tmp_path / "b")
    assert torch.equal(a.rows(range(32)).enc, b.rows(range(32)).enc)


@pytest.mark.parametrize("dict_class", ["AutoEncoder", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_told_without_a_configuration(tmp_path: Path, dict_class: str) -> None:
    written = write_dictionary_learning(tmp_path, dict_class=dict_class, with_config=False)
    sae, x = open_sae(tmp_path), tokens(16)
    assert sae.spec.architecture == dict_class
    assert sae.spec.site is None
    assert any("name its site" in note for note in sae.spec.notes)
    assert_forward(sae, x, *forward(written, x, dict_class))


@pytest.mark.parametrize("dict_class", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_not_told_apart_without_a_configuration(tmp_path: Path, dict_class: str) -> None:
    write_dictionary_learning(tmp_path, dict_class=dict_class, with_config=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"no config\.json with trainer\.dict_class"):
        open_sae(tmp_path)


@pytest.mark.parametrize("dict_class", ["AutoEncoderNew", "JumpReluAutoEncoder"])
def test_tensors_of_other_families_are_not_claimed(tmp_path: Path, dict_class: str) -> None:
    write_dictionary_learning(tmp_path, dict_class=dict_class, with_config=False)
    with pytest.raises(UnsupportedCheckpoint, match="class"):
        open_sae(tmp_path, family="dictionary_learning")


def test_topk_by_its_stored_threshold(tmp_path: Path) -> None:
    written = write_dictionary_learning(tmp_path, dict_class="AutoEncoderTopK")
    exact, approximate = open_sae(tmp_path), open_sae(tmp_path, topk="threshold")
    assert (exact.spec.activation, exact.spec.k) == (Activation.TOPK, 4)
    assert (approximate.spec.activation, approximate.spec.k) == (Activation.JUMPRELU, None)
    assert any("stores a threshold, 0.5, which is not used" in note for note in exact.spec.notes)
    assert exact.fingerprint != approximate.fingerprint
    x = tokens(16)
    assert_forward(approximate, x, *forward(written, x, "BatchTopKSAE"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"dict_class": "AutoEncoder"},
        {"dict_class": "BatchTopKSAE"},
        {"dict_class": "AutoEncoderTopK", "threshold": -1.0},
        {"dict_class": "AutoEncoderTopK", "tensors": {"threshold": DROP}},
    ],
)
def test_no_threshold_to_ask_for(tmp_path: Path, arguments: dict[str, Any]) -> None:
    write_dictionary_learning(tmp_path, **arguments)
    assert open_sae(tmp_path).spec.n_features == 32
    with pytest.raises(UnsupportedCheckpoint, match="threshold was asked for"):
        open_sae(tmp_path, topk="threshold")


def test_a_threshold_that_was_never_trained_is_plain_relu(tmp_path: Path) -> None:
    written = write_dictionary_learning(tmp_path, dict_class="BatchTopKSAE", threshold=-1.0)
    sae, x = open_sae(tmp_path), tokens(16)
    assert any("plain ReLU" in note for note in sae.spec.notes)
    assert_forward(sae, x, *forward(written, x, "BatchTopKSAE"))


def test_values_are_the_files_own(tmp_path: Path) -> None:
    # The library's loader rescales this class; its file does not.
    write_dictionary_learning(tmp_path)
    spec = open_sae(tmp_path).spec
    assert spec.value_convention == "raw"
    assert any("multiplies them by the norms" in note for note in spec.notes)


@pytest.mark.parametrize("submodule", [None, "resid_post_layer_4", "mlp_out_layer_3", "layer3"])
def test_a_site_that_is_not_plain_is_left_to_the_user(tmp_path: Path, submodule: str | None) -> None:
    write_dictionary_learning(tmp_path, trainer={"submodule_name": submodule})
    spec = open_sae(tmp_path).spec
    assert spec.site is None
    assert any(repr(submodule) in note for note in spec.notes)


def test_an_interrupted_run(tmp_path: Path) -> None:
    written = write_dictionary_learning(tmp_path)
    torch.save({"step": 10, "ae": written, "optimizer": {}, "config": {}, "norm_factor": 3.0}, tmp_path / "ae.pt")
    with pytest.raises(UnsupportedCheckpoint, match="backup of an interrupted run"):
        open_sae(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dict_class": "CrossCoder"}, r"dict_class is 'CrossCoder', which is refused: known are AutoEncoder"),
        (
            {"trainer": {"dict_size": 33}},
            r"encoder\.bias has the shape \[32\], and by config\.json it should be \[33\]",
        ),
        ({"trainer": {"activation_dim": 17}}, r"encoder\.weight has the shape \[32, 16\].*\[32, 17\]"),
        ({"trainer": {"dict_size": "many"}}, "dict_size is 'many'"),
        ({"trainer": {"dict_class": 3}}, "dict_class is 3"),
        ({"dict_class": "AutoEncoderTopK", "trainer": {"k": 5}}, "k is 5, and the weights say 4"),
        ({"dict_class": "AutoEncoderTopK", "k": 33}, "from 1 to 32"),
        ({"dict_class": "BatchTopKSAE", "tensors": {"threshold": DROP}}, "lacks threshold, which BatchTopKSAE needs"),
        ({"dict_class": "BatchTopKSAE", "tensors": {"threshold": torch.ones(32)}}, r"threshold has the shape \[32\]"),
        ({"dict_class": "GatedAutoEncoder", "tensors": {"r_mag": DROP}}, "lacks r_mag"),
        ({"tensors": {"decoder.weight": torch.ones(32, 16)}}, r"decoder\.weight has the shape \[32, 16\].*\[16, 32\]"),
        ({"tensors": {"encoder.bias": torch.ones(32, dtype=torch.int8)}}, r"encoder\.bias is stored as torch\.int8"),
        ({"tensors": {"encoder.bias": torch.ones(0)}}, r"by config\.json it should be \[32\]"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write_dictionary_learning(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_the_class_decides_over_the_tensors(tmp_path: Path) -> None:
    # The two TopK classes have the same tensors: only the configuration says which one it is.
    for dict_class in ("AutoEncoderTopK", "BatchTopKSAE"):
        write_dictionary_learning(tmp_path / dict_class, dict_class=dict_class)
    found = [open_sae(tmp_path / name).spec.activation for name in ("AutoEncoderTopK", "BatchTopKSAE")]
    assert found == [Activation.TOPK, Activation.JUMPRELU]


def test_a_damaged_configuration_beside_plain_tensors(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        open_sae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": 3}))
    with pytest.raises(CheckpointError, match=r"trainer is 3; needed is an object"):
        open_sae(tmp_path)
