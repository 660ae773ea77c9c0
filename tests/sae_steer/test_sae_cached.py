"""What a server must convert before it can serve it: once, for all processes, and all or nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sae_steer.errors import CheckpointError, CompressedCheckpoint
from sae_steer.sae import cached, open_sae
from sae_steer.sae.cached import open_served
from tests.sae_writers.gemma import write_scope

SCOPE = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def test_without_a_folder_it_is_refused(tmp_path: Path) -> None:
    path = write_scope(tmp_path / SCOPE, compressed=True)
    with pytest.raises(CompressedCheckpoint, match="sae-steer convert"):
        open_served(path)
    with pytest.raises(CheckpointError, match="not a folder"):
        open_served(path, cache=tmp_path / "nowhere")


def test_what_can_be_mapped_is_not_converted(tmp_path: Path, cache: Path) -> None:
    path = write_scope(tmp_path / SCOPE)
    assert open_served(path, cache=cache).fingerprint == open_sae(path).fingerprint
    assert not list(cache.iterdir())


def test_it_is_converted_once_and_found_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    convert = cached.convert
    monkeypatch.setattr(
        cached, "convert", lambda sae, target, *rest: made.append(target) or convert(sae, target, *rest)
    )
    path = write_scope(tmp_path / "a" / SCOPE, compressed=True)
    with ThreadPoolExecutor(4) as pool:  # as the processes of a server, which start together
        opened = list(pool.map(lambda _: open_served(path, cache=cache), range(4)))
    assert len(made) == 1
    assert len({sae.fingerprint for sae in opened}) == 1
    stored = open_sae(write_scope(tmp_path / "b" / SCOPE))
    ids = list(range(stored.spec.n_features))
    for name in ("enc", "dec", "bias", "theta"):
        assert torch.equal(getattr(opened[0].rows(ids), name), getattr(stored.rows(ids), name))
    assert str(opened[0].spec.site) == str(stored.spec.site)
    assert {entry.suffix for entry in cache.iterdir()} <= {"", ".lock"}, "nothing temporary is left"


def test_another_archive_is_another_conversion(tmp_path: Path, cache: Path) -> None:
    first = open_served(write_scope(tmp_path / "a" / SCOPE, compressed=True), cache=cache)
    other = open_served(write_scope(tmp_path / "b" / SCOPE, compressed=True, n_features=48), cache=cache)
    assert (first.path, first.spec.n_features) != (other.path, other.spec.n_features)


def test_a_conversion_that_failed_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scope(tmp_path / SCOPE, compressed=True)

    def failing(*_: object) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(cached, "convert", failing)
        with pytest.raises(CheckpointError, match="the disk is full"):
            open_served(path, cache=cache)
    assert open_served(path, cache=cache).spec.family == "canonical"
