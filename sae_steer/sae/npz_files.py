"""numpy's ``.npz`` archives: the arrays that are stored uncompressed, mapped where they lie in the archive."""

import math
import shlex
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sae_steer.errors import CheckpointError, CompressedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae.pickles import BROKEN_ARCHIVE

_LOCAL_HEADER = 30  # bytes before an archive member's own name
_PIECE = 2**22


def map_npz(path: Path, unpacked: Path | None = None) -> dict[str, Tensor]:
    """The arrays of an archive by name, mapped: pages are read when values are used.

    Args:
        path: The archive.
        unpacked: A folder for the arrays of a compressed archive, which must stay while they are used; None = such an
            archive is refused.

    Raises:
        UnsafeCheckpoint: An array of Python objects, which is a pickle.
        CompressedCheckpoint: Compressed arrays.
        UnsupportedCheckpoint: A type that is not a number's.
        CheckpointError: It is damaged or not there.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if all(member.compress_type == zipfile.ZIP_STORED for member in members):
                return {member.filename.removesuffix(".npy"): _map(path, file, member) for member in members}
            if unpacked is not None:
                return map_npz(_unpack(path, archive, members, unpacked))
            source, target = (shlex.quote(str(place)) for place in (path, path.with_suffix("")))
            raise CompressedCheckpoint(
                f"{path} is compressed, so single rows cannot be read from it. Convert it once, and name the result "
                f"instead: sae-steer convert {source} {target}",
                path,
            )
    except (OSError, *BROKEN_ARCHIVE) as error:
        raise CheckpointError(f"{path} is not a readable npz file: {error}") from error


def _unpack(path: Path, archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], folder: Path) -> Path:
    """Writes the arrays of a compressed archive into a stored one in ``folder``, a piece at a time."""
    need, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{path} needs {need / 1e9:.1f} GB unpacked, and {free / 1e9:.1f} GB are free in {folder}."
        )
    stored = folder / path.name
    with zipfile.ZipFile(stored, "x", zipfile.ZIP_STORED) as target:
        for member in members:
            with archive.open(member) as source, target.open(member.filename, "w", force_zip64=True) as file:
                shutil.copyfileobj(source, file, _PIECE)
    return stored


def _map(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> Tensor:
    shape, fortran, dtype, begin, end = _read_header(path, file, member)
    length = math.prod(shape) * dtype.itemsize
    if begin + length > end:
        raise CheckpointError(f"{path}: {member.filename} is longer than its place in the archive.")
    if length == 0:
        return torch.from_numpy(np.empty(shape, dtype))
    # Copy-on-write, since torch takes no read-only memory; nothing is written. Archives align nothing: CPUs read
    # numbers at any address, and rows are copied out before they are computed with.
    mapped = np.memmap(path, dtype, mode="c", offset=begin, shape=shape, order="F" if fortran else "C")
    return torch.from_numpy(mapped)


def _read_header(
    path: Path, file: BinaryIO, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, "np.dtype[np.generic]", int, int]:
    """Shape, Fortran order and type of an array that is stored in an archive, where its values begin, and its end."""
    # The local header's own lengths: they may differ from those of the directory at the end of the archive.
    file.seek(member.header_offset)
    local = file.read(_LOCAL_HEADER)
    if len(local) < _LOCAL_HEADER or not local.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path} is damaged at {member.filename}.")
    start = member.header_offset + _LOCAL_HEADER
    start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    file.seek(start)
    version = npy.read_magic(file)  # type: ignore[no-untyped-call]
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise UnsupportedCheckpoint(
            f"{path}: {member.filename} is of numpy's format {version}, which is not read here."
        )
    shape, fortran, dtype = read(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        raise UnsafeCheckpoint(f"{path}: {member.filename} holds Python objects, which is a pickle. It was not loaded.")
    if dtype.kind not in "fiu" or not dtype.isnative:
        raise UnsupportedCheckpoint(f"{path}: {member.filename} is stored as {dtype}, which is not read here.")
    return shape, fortran, dtype, file.tell(), start + member.file_size
