"""Files that are there whole or not at all, for whoever may read the folder."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sae_steer import whole_files
from sae_steer.catalog import ProfileStore
from sae_steer.schema import Profile
from sae_steer.whole_files import write_whole
from tests.calibrations import made_up


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "left"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_says_who_can_read_it(tmp_path: Path, mask: int, left: int) -> None:
    path = tmp_path / "file"
    with umask(mask):
        write_whole(path, b"first")
        write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert mode(path) == left
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_finished_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"first")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_profile_can_be_served_by_another_account(tmp_path: Path) -> None:
    steered = {"sae": "res", "features": [1], "op": "ablate"}
    with umask(0o022):
        made_up([1, 2, 3], 2).write(tmp_path)
        ProfileStore(tmp_path).put(Profile.model_validate({"name": "calm", "interventions": [steered]}))
    assert mode(tmp_path / "profile.safetensors") == 0o644
    assert mode(tmp_path / "calm" / "profile.json") == 0o644
