"""Torch's ``.pt`` and ``.pth`` files, mapped; of all that a pickle may name, only what tensors are made of is let in.

Two walls: the names that the file would import are read from its opcodes and held against a list, and then torch's own
restricted reader (``weights_only``) loads it, which runs nothing else either.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

import torch

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae.pickles import BROKEN_ARCHIVE, not_loaded, pickled_globals, refuse_pickle

MAX_PICKLE_BYTES = 16 * 2**20  # the object graph alone; tensors are records of their own
_DEPTH = 2
_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_DTYPES = ("bfloat16", "float16", "float32", "float64", "int32", "int64")
# What a damaged pickle makes torch's reader raise has no one class.
_UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, UnpicklingError, struct.error,
)  # fmt: skip
ALLOWED_GLOBALS = frozenset(
    {"collections.OrderedDict", "torch.Size", "torch.device"}
    | {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
    | {f"torch.{name}Storage" for name in _STORAGES}
    | {f"torch.{name}" for name in _DTYPES}
)


def map_torch(path: Path) -> Mapping[str, object]:
    """The mapping in a torch file: tensors, read from disk when their values are used, and plain values beside them.

    Raises:
        UnsafeCheckpoint: It names anything that no tensor is made of; the message says what.
        UnsupportedCheckpoint: It cannot be mapped: written before torch 1.6, or compressed.
        CheckpointError: It is damaged, not there, or holds no mapping by name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            pickles = [record for record in records if record.filename.endswith("data.pkl")]
            if not pickles:
                raise CheckpointError(f"{path} is a zip archive without data.pkl, so not one that torch wrote.")
            if any(record.file_size > MAX_PICKLE_BYTES for record in pickles):
                raise CheckpointError(f"{path}: its pickle is larger than {MAX_PICKLE_BYTES} bytes, the most read.")
            names = sorted({name for record in pickles for name in pickled_globals(archive.read(record))})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except BROKEN_ARCHIVE as error:
        _refuse_other(path, error)
    unknown = [name for name in names if name not in ALLOWED_GLOBALS]
    if unknown:
        raise UnsafeCheckpoint(not_loaded(path, unknown))
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UnsupportedCheckpoint(
            f"{path} is compressed, as torch writes no file, so it cannot be mapped. Repack it."
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a readable torch file: {reason}") from error
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; needed is a mapping of tensors by name.")
    return _detached(value, _DEPTH)


def _detached(values: Mapping[str, object], depth: int) -> dict[str, object]:
    """The mapping without gradients, which parameters ask for, down to the depth at which state dicts lie."""
    plain: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            plain[name] = value.detach()
        else:
            plain[name] = _detached(value, depth - 1) if isinstance(value, dict) and depth else value
    return plain


def _refuse_other(path: Path, error: Exception) -> NoReturn:
    """Refuses what is no zip archive: a bare pickle, torch's form before 1.6 among them, or a damaged file."""
    with path.open("rb") as file:
        head = file.read(MAX_PICKLE_BYTES)
    if head.startswith(b"PK"):
        raise CheckpointError(f"{path} is not a readable torch file: {error}. It is cut short, or damaged.") from error
    names = set(pickled_globals(head))
    if head.startswith(b"\x80") and names and names <= ALLOWED_GLOBALS:
        raise UnsupportedCheckpoint(
            f"{path} was written in torch's form before 1.6, which cannot be mapped. Load it with weights_only=True "
            "and save it again."
        ) from error
    refuse_pickle(path)
    raise CheckpointError(f"{path} is not a readable torch file: {error}") from error
