"""Which model this is: a fingerprint that is cheap, and the same wherever the same files are served.

Of a folder: its ``config.json`` without what changes from version to version, and of each weight file its list of
tensors and one block from the middle of every tensor. So any training that touched a tensor changes it, and a model of
many gigabytes takes a few megabytes of reading. It says nothing of the precision that a host computes in.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_steer.errors import StartError

BLOCK_BYTES = 4096
_BLOCKS = 64  # of a file whose tensors are not told apart
_MAX_HEADER = 256 * 2**20
_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "_commit_hash", "_attn_implementation", "torch_dtype", "dtype"}
    | {"use_cache", "architectures"}
)
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def local_folder(model: str, *, revision: str | None = None, cache: str | None = None) -> Path | None:
    """The folder (or the one file) of a model on this machine, of a hub id its snapshot; None where there is none."""
    if os.path.exists(model):  # unlike Path's, false for what can be no path
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def of_folder(folder: Path) -> str:
    """The fingerprint ``sha256:...`` of a model's folder, or of its one file.

    Raises:
        StartError: There is no model, or it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if folder.is_file():
            _add_file(digest, folder)
            return f"sha256:{digest.hexdigest()}"
        digest.update(_canonical(json.loads((folder / "config.json").read_bytes())))
        files = _weight_files(folder)
        for path in files:
            _add_file(digest, path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StartError(f"The model in {folder} cannot be told from others: {error}") from error
    if not files:
        raise StartError(f"The folder {folder} holds no weights.")
    return f"sha256:{digest.hexdigest()}"


def of_source(model: str, *, revision: str | None = None, cache: str | None = None) -> str | None:
    """The fingerprint of a folder or a hub id; None where its files are not here, or of no known form."""
    folder = local_folder(model, revision=revision, cache=cache)
    try:
        return of_folder(folder) if folder is not None else None
    except StartError:
        return None


def of_model(model: PreTrainedModel) -> str:
    """The fingerprint of a model in memory: its folder's while it holds the folder's weights, else one of its own."""
    folder = local_folder(model.name_or_path) if model.name_or_path else None
    if folder is not None and folder.is_dir() and _holds(model, folder):
        return of_folder(folder)
    return _of_memory(model)


def _weight_files(folder: Path) -> list[Path]:
    """Those that make up the model: what its index names, else all of the first kind that is there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    alone = folder / "model.safetensors"  # beside which a publisher may keep other copies
    if alone.is_file():
        return [alone]
    for suffix in _WEIGHTS:
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        if found:
            return found
    return []


def _add_file(digest: Any, path: Path) -> None:
    """Adds a weight file: its list of tensors and a block of each, or where that is not told, blocks all over it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{path.name} {size}\n".encode())
        if path.suffix == ".safetensors":
            header, start = _header(file, size)
            digest.update(_canonical(header))
            spans = [(start + first, start + last) for first, last in _spans(header)]
        else:
            spans = [(size * i // _BLOCKS, size * (i + 1) // _BLOCKS) for i in range(_BLOCKS)]
        for first, last in spans:
            where = _middle(last - first)
            file.seek(first + where.start)
            digest.update(file.read(where.stop - where.start))


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, and where their bytes begin; raises ``ValueError`` for another file."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise ValueError("a weight file is not a safetensors file")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a weight file is not a safetensors file")
    header.pop("__metadata__", None)
    return header, 8 + length


def _spans(header: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for name in sorted(header):
        first, last = header[name]["data_offsets"]
        yield int(first), int(last)


def _middle(length: int) -> slice:
    """A block of at most :data:`BLOCK_BYTES` from the middle of ``length`` bytes."""
    first = max((length - BLOCK_BYTES) // 2, 0)
    return slice(first, min(first + BLOCK_BYTES, length))


def _canonical(value: Any) -> bytes:
    def kept(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: kept(part) for key, part in item.items() if key not in _VOLATILE}
        return [kept(part) for part in item] if isinstance(item, list) else item

    return json.dumps(kept(value), sort_keys=True, separators=(",", ":")).encode()


def _block(tensor: Tensor) -> Tensor:
    """The middle of a tensor, flat, on the CPU; about :data:`BLOCK_BYTES`."""
    flat = tensor.detach().reshape(-1)
    most = max(BLOCK_BYTES // max(flat.element_size(), 1), 1)
    first = max((flat.numel() - most) // 2, 0)
    return flat[first : first + most].cpu().contiguous()


def _holds(model: nn.Module, folder: Path) -> bool:
    """Whether the weights in memory are those of the files, as far as they have the same names and shapes."""
    state = model.state_dict()
    compared = 0
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in sorted(set(file.keys()) & state.keys()):
                    mine = state[name]
                    if list(file.get_slice(name).get_shape()) != list(mine.shape) or not mine.is_floating_point():
                        continue
                    stored = file.get_tensor(name)  # mapped: only the block is read
                    compared += 1
                    if not torch.equal(_block(mine), _same_block(stored, mine)):
                        return False
    except (OSError, SafetensorError):
        return False
    return compared > 0


def _same_block(stored: Tensor, mine: Tensor) -> Tensor:
    """The block of the file's tensor that :func:`_block` takes of ``mine``, in its dtype."""
    flat = stored.reshape(-1)
    most = max(BLOCK_BYTES // max(mine.element_size(), 1), 1)
    first = max((flat.numel() - most) // 2, 0)
    return flat[first : first + most].to(mine.dtype)


def _of_memory(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(b"in memory\n")
    digest.update(_canonical(json.loads(model.config.to_json_string(use_diff=False))))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_block(tensor).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
