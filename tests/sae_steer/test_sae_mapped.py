"""Torch files and npz archives: mapped where they lie, and refused where they are damaged or hold more than numbers."""

import contextlib
import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae import npz_files, open_sae, torch_files
from sae_steer.sae.files import map_weights
from sae_steer.sae.npz_files import map_npz
from sae_steer.sae.torch_files import map_torch
from tests.sae_writers.dictionary_learning import write_dictionary_learning
from tests.sae_writers.gemma import write_scope
from tests.sae_writers.goodfire import write_goodfire

VALUES = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "view": torch.arange(20.0).reshape(4, 5).T,
    "scalar": torch.tensor(3),
}


def same(found: Any, wanted: Any) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def rezip(source: Path, target: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Path:
    """Copies an archive member by member, as ``change`` writes each."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            change(new, member, old.read(member))
    return target


# ---------------------------------------------------------------------------------------------- torch files


def test_a_torch_file_is_mapped(tmp_path: Path) -> None:
    plain = {"activation": "TopK", "state": {"k": 32, "post": "ReLU"}, "size": torch.Size([3]), "type": torch.bfloat16}
    torch.save(OrderedDict(VALUES | plain), tmp_path / "a.pt")
    found = map_torch(tmp_path / "a.pt")
    assert all(same(found[name], value) for name, value in VALUES.items())
    assert {name: found[name] for name in plain} == plain
    assert map_weights(tmp_path / "a.pt").tensors.keys() == VALUES.keys()


def test_parameters_are_tensors(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "a.pth")
    torch.save({"sae": {"w": torch.nn.Parameter(torch.ones(3))}}, tmp_path / "b.pth")
    assert map_torch(tmp_path / "a.pth").keys() == {"weight", "bias"}
    inner: Any = map_torch(tmp_path / "b.pth")["sae"]
    assert torch.equal(inner["w"], torch.ones(3))
    assert not inner["w"].requires_grad


class Custom:
    """What no tensor is made of."""


@pytest.mark.parametrize("value", [Custom(), Path("x"), {1, 2}, np.float64(3), np.ones(3), torch.nn.Linear(2, 2)])
def test_more_than_tensors_is_refused_by_name(tmp_path: Path, value: object) -> None:
    torch.save({"a": torch.ones(3), "other": value}, tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"looks up .*[A-Za-z_]\w*\.[A-Za-z_]\w*.*not loaded"):
        map_torch(tmp_path / "a.pt")


def test_of_two_pickles_in_an_archive_both_are_looked_at(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    torch.save({"a": Custom()}, tmp_path / "bad.pt")
    bad = zipfile.ZipFile(tmp_path / "bad.pt").read("bad/data.pkl")

    def add(archive: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
        archive.writestr(member.filename, content)
        if member.filename.endswith("data.pkl"):
            archive.writestr("other/data.pkl", bad)

    path = rezip(tmp_path / "good.pt", tmp_path / "two.pt", add)
    with pytest.raises(UnsafeCheckpoint, match="Custom"):
        map_torch(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "a.pt")

    def deflate(archive: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
        archive.writestr(member.filename, content, zipfile.ZIP_DEFLATED)

    with pytest.raises(UnsupportedCheckpoint, match="is compressed"):
        map_torch(rezip(tmp_path / "a.pt", tmp_path / "b.pt", deflate))


def test_the_form_of_before_torch_1_6(tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"before 1\.6"):
        map_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], 7, {3: torch.ones(3)}])
def test_no_mapping_by_name(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="needed is a mapping"):
        map_torch(tmp_path / "a.pt")


def test_no_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        map_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(CheckpointError, match=r"without data\.pkl"):
        map_torch(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        map_torch(tmp_path / "missing.pt")


def test_a_large_pickle_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 100)
    torch.save(VALUES, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        map_torch(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------------ archives


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_archive_is_mapped(tmp_path: Path, order: str) -> None:
    arrays = {
        "w": np.asarray(np.arange(12, dtype=np.float32).reshape(3, 4), order=order),  # type: ignore[call-overload]
        "half": np.arange(3, dtype=np.float16),
        "k": np.array(4),
        "none": np.empty((0, 3)),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    found = map_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


def test_values_at_odd_addresses(tmp_path: Path) -> None:
    # An archive aligns nothing: members of every length in front.
    for length in range(1, 9):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("x" * length, b"")
            stream = io.BytesIO()
            np.save(stream, np.arange(40, dtype=np.float32).reshape(8, 5))
            archive.writestr("w.npy", stream.getvalue())
        rows = map_npz(tmp_path / "a.npz")["w"][torch.tensor([6, 1])].double()
        assert rows.tolist() == [[30, 31, 32, 33, 34], [5, 6, 7, 8, 9]]


def test_an_array_longer_than_its_place(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (99,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + b"\0" * 16)
        archive.writestr("x.npy", b"\0" * 4000)
    with pytest.raises(CheckpointError, match="longer than its place"):
        map_npz(tmp_path / "a.npz")


def test_too_large_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scope(tmp_path, compressed=True)

    class Full:
        free = 0

    monkeypatch.setattr(npz_files.shutil, "disk_usage", lambda folder: Full)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB unpacked, and 0\.0 GB are free"):
        map_npz(path, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["params.npz"]


# ---------------------------------------------------------------------------------------- damage, anywhere

WRITERS: dict[str, Callable[[Path], Path]] = {
    "goodfire": lambda folder: (write_goodfire(folder), folder / "Llama-3.1-8B-Instruct-SAE-l19.pth")[1],
    "dictionary_learning": lambda folder: (write_dictionary_learning(folder), folder / "ae.pt")[1],
    "gemma_scope": lambda folder: write_scope(folder),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kept", [0, 1, 40, 0.3, 0.9, -1])
def test_truncated(tmp_path: Path, writer: str, kept: float) -> None:
    path = WRITERS[writer](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    for location in (tmp_path, path):
        with pytest.raises(CheckpointError) as caught:
            open_sae(location)
        assert path.name in caught.value.message


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), writer=st.sampled_from(sorted(WRITERS)))
def test_one_byte_changed_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: float, byte: int, writer: str
) -> None:
    folder = tmp_path_factory.mktemp("sae")
    path = WRITERS[writer](folder)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= byte
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        sae = open_sae(folder)
        sae.rows(range(sae.spec.n_features))


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header = b'{"w_enc":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'
    path = tmp_path / "params.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_sae(path)
