"""What is not computed exactly, or not safe to read, is refused by name, with the reason."""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae import open_sae
from sae_steer.sae.pickles import is_pickle, pickled_globals
from tests.sae_files import DROP, write_saelens

ONES = torch.ones(32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "factor is not in the files"),
        ({"normalize_activations": True, "version": "2"}, "factor is not in the files"),
        ({"normalize_activations": "covariance_whitening"}, "matrices are not in the file"),
        ({"normalize_activations": "batch_norm"}, "'batch_norm'.*known are none, layer_norm"),
        ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "output is not scaled back"),
        ({"architecture": "temporal"}, "other positions"),
        ({"architecture": "matching_pursuit"}, "no row of its own"),
        ({"architecture": "abstopk"}, "signed"),
        ({"architecture": "batchtopk"}, "inference form"),
        ({"architecture": "matryoshka_batchtopk"}, "inference form"),
        ({"architecture": "mystery"}, "'mystery'.*known are standard"),
        ({"architecture": "standard", "version": "5", "activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        ({"architecture": "jumprelu", "version": "5", "activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "lives at its output"),
        ({"cfg": {"reshape_activations": "hook_z"}}, "reshape_activations is 'hook_z'"),
        ({"version": "5", "cfg": {"hook_head_index": 3}}, "single attention head"),
        ({"cfg": {"metadata": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 0}}}, "single attention head"),
        ({"tensors": {"scaling_factor": ONES * 1.5}}, "scaling_factor is not 1 everywhere"),
        (
            {
                "normalize_activations": "constant_norm_rescale",
                "model_from_pretrained_kwargs": {"center_writing_weights": True},
            },
            "centred weights and constant_norm_rescale",
        ),
        (
            {"hook_name": "blocks.1.attn.hook_z", "model_from_pretrained_kwargs": {"fold_value_biases": True}},
            "fold_value_biases changes z",
        ),
        (
            {"hook_name": "blocks.1.mlp.hook_in", "model_from_pretrained_kwargs": {"fold_ln": True}},
            "fold_ln changes mlp_in",
        ),
        ({"tensors": {"W_enc": torch.ones(16, 32, dtype=torch.int8)}}, "W_enc is stored as torch.int8"),
    ],
)
def test_unsupported(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write_saelens(tmp_path, **arguments)
    with pytest.raises(UnsupportedCheckpoint, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.code == "unsupported_checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensors": {"b_enc": DROP}}, "lacks b_enc, which 'jumprelu' needs. It holds W_dec, W_enc"),
        ({"tensors": {"W_enc": DROP, "b_dec": DROP}}, "lacks W_enc, b_dec"),
        ({"tensors": {"threshold": DROP}}, "lacks threshold"),
        ({"tensors": {"log_threshold": ONES}}, "both threshold and log_threshold"),
        ({"architecture": "gated", "tensors": {"r_mag": DROP}}, "lacks r_mag"),
        ({"tensors": {"W_enc": torch.ones(32, 16)}}, r"W_enc has the shape \[32, 16\].*should be \[16, 32\]"),
        ({"tensors": {"threshold": torch.ones(1)}}, r"threshold has the shape \[1\]"),
        ({"cfg": {"d_sae": 31}}, r"W_dec has the shape \[32, 16\]"),
        ({"architecture": "transcoder", "cfg": {"d_out": 20}}, "W_dec has the shape"),
        ({"architecture": "transcoder", "cfg": {"d_out": DROP}}, "d_out is None"),
        ({"cfg": {"d_in": DROP}}, "d_in is None; needed is a whole number"),
        ({"cfg": {"d_in": True}}, "d_in is True"),
        ({"cfg": {"d_sae": "32"}}, "d_sae is '32'"),
        ({"cfg": {"apply_b_dec_to_input": "yes"}}, "apply_b_dec_to_input is 'yes'"),
        ({"cfg": {"metadata": 3}}, "metadata is 3"),
        ({"cfg": {"normalize_activations": 3}}, "normalize_activations is 3"),
        ({"architecture": "topk", "cfg": {"k": DROP}}, "k is None"),
        ({"architecture": "topk", "k": 33}, "k is 33; needed is at most d_sae, 32"),
    ],
)
def test_broken(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write_saelens(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_sae(tmp_path)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("key", ["threshold", "log_threshold"])
def test_a_scalar_threshold_is_not_guessed_at(tmp_path: Path, key: str) -> None:
    write_saelens(tmp_path, tensors={"threshold": DROP} | {key: torch.tensor(0.5)})
    with pytest.raises(CheckpointError, match=rf"{key} has the shape \[\]"):
        open_sae(tmp_path)


def test_a_scaling_factor_of_ones_is_left_out(tmp_path: Path) -> None:
    write_saelens(tmp_path, tensors={"scaling_factor": ONES})
    assert any("scaling_factor" in note for note in open_sae(tmp_path).spec.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{'d_in': 3}", "not readable JSON"),
        (b"\xff\xfe\x00", "not readable JSON"),
        (b"[" * 200_000, "not readable JSON"),
        (b"[]", "holds a JSON list"),
        (b" " * (2**20 + 1), "larger than 1048576 bytes"),
    ],
    ids=["empty", "python", "binary", "nested", "list", "large"],
)
def test_unreadable_json(tmp_path: Path, content: bytes, message: str) -> None:
    write_saelens(tmp_path)
    (tmp_path / "cfg.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"cfg\.json.*{message}"):
        open_sae(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 40, -5])
def test_damaged_weights(tmp_path: Path, keep: int) -> None:
    write_saelens(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_sae(tmp_path)


class Payload:
    """Runs when it is unpickled: makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def hostile(target: Path, form: str) -> bytes:
    if form == "zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(target), protocol=2))
        return stream.getvalue()
    if form == "several":  # as torch.save before 1.6: a number first, the object later
        return pickle.dumps(119547037146038801333356, protocol=2) + pickle.dumps(Payload(target), protocol=2)
    return pickle.dumps(Payload(target), protocol=int(form))


FORMS = ["0", "1", "2", "3", "4", "5", "several", "zip"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "sae_weights.pt", "model.bin", "sae.pkl"])
def test_a_pickle_never_runs(tmp_path: Path, name: str, form: str) -> None:
    folder, target = tmp_path / "sae", tmp_path / "ran"
    write_saelens(folder)
    (folder / "sae_weights.safetensors").unlink()
    (folder / name).write_bytes(hostile(target, form))
    for location in (folder, folder / name):
        with pytest.raises(UnsafeCheckpoint, match=r"is a pickle.*not loaded") as caught:
            open_sae(location)
        assert name in caught.value.message
        assert "getattr" in caught.value.message or "Path" in caught.value.message
    assert not target.exists()
    if form not in {"several", "zip"}:
        pickle.loads((folder / name).read_bytes())
        assert target.exists(), "the payload was no payload"


def test_a_broken_zip_is_refused_too(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04", b"PK\x03\x04" + bytes(100)):
        path = tmp_path / "sae.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cut short, or damaged"):
            open_sae(path)


def test_pickles_beside_good_weights_are_left_alone(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    (tmp_path / "trainer_state.pt").write_bytes(hostile(tmp_path / "ran", "2"))
    assert open_sae(tmp_path).rows([0]).enc.isfinite().all()
    assert not (tmp_path / "ran").exists()


def test_a_safetensors_header_that_begins_like_a_pickle() -> None:
    assert not is_pickle((0x0280).to_bytes(8, "little") + b'{"a":')
    assert is_pickle(b"\x80\x02}q\x00.")


@given(st.binary(max_size=400))
def test_looking_at_opcodes_never_raises(content: bytes) -> None:
    list(pickled_globals(content))
    list(pickled_globals(b"\x80\x04" + content))


@given(st.lists(st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes]), max_size=40))
def test_looking_at_bare_opcodes_never_raises(codes: list[bytes]) -> None:
    list(pickled_globals(b"".join(codes)))
    list(pickled_globals(b"\xff\xff\n".join(codes)))
