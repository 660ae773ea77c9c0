"""The fingerprint of a model: the same wherever its files are served, and another for any other model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_steer import embedded
from sae_steer.calibration.model import local_folder, of_folder, of_model, of_source
from sae_steer.errors import StartError
from tests.sae_steer.helpers import tiny_model

MODEL = embedded.FOLDER / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()  # type: ignore[no-any-return]


def test_a_copy_is_the_same_model(folder: Path) -> None:
    assert of_folder(folder) == of_folder(MODEL) == of_source(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_model_is_its_folders(dtype: torch.dtype) -> None:
    assert of_model(load(MODEL, dtype)) == of_folder(MODEL)


def test_what_changes_from_version_to_version_is_left_out(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "0.0.0", "dtype": "float16", "use_cache": False}
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    (folder / "README.md").write_text("Read me.")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert of_folder(folder) == of_folder(MODEL)


def test_any_tensor_that_was_trained_on_shows(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    found = {of_folder(MODEL)}
    for name in list(weights)[::9]:
        changed = weights | {name: weights[name] * 1.01}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        found.add(of_folder(folder))
    assert len(found) == 1 + len(list(weights)[::9])


def test_another_configuration_is_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert of_folder(folder) != of_folder(MODEL)


def test_a_model_that_was_changed_in_memory_is_not_its_folders() -> None:
    model = load(MODEL)
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight.add_(0.01)  # type: ignore[operator,union-attr]
    assert of_model(model) != of_folder(MODEL)


def test_a_model_without_a_folder_is_told_by_its_weights() -> None:
    one, same = tiny_model(), tiny_model()
    assert of_model(one) == of_model(same)
    with torch.no_grad():
        same.get_submodule("model.norm").weight.add_(0.01)  # type: ignore[operator,union-attr]
    assert of_model(one) != of_model(same)


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = load(MODEL)
    model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    before = of_folder(tmp_path / "shards")
    assert of_model(load(tmp_path / "shards")) == before
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(StartError):
        of_folder(tmp_path / "shards")


@pytest.mark.parametrize("source", ["", "no such folder", "org/repo-that-is-not-here", "a b/c", "x" * 300, "\0"])
def test_what_is_not_here_has_no_fingerprint(source: str) -> None:
    assert local_folder(source) is None
    assert of_source(source) is None


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff" * 100])
def test_broken_folders_are_start_errors(folder: Path, spoil: str, content: bytes | None) -> None:
    if content is None:
        (folder / spoil).unlink()
    else:
        (folder / spoil).write_bytes(content)
    with pytest.raises(StartError):
        of_folder(folder)
    assert of_source(str(folder)) is None


def test_pickled_weights_are_told_apart_without_opening_them(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    found = set()
    for seed in range(3):
        content = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()
        (folder / "pytorch_model.bin").write_bytes(content)
        found.add(of_folder(folder))
    assert len(found) == 3
