"""Converts an opened SAE to the canonical layout: block by block, in bounded memory, all or nothing."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from sae_steer.errors import CheckpointError
from sae_steer.sae.canonical import DEC_BIAS, FILE, combined_digest, folded, header_metadata, shapes
from sae_steer.sae.labels import LABELS_FILE, labels_file
from sae_steer.sae.record import FeatureRows, Sae, SaeSpec

_BLOCK_BYTES = 2**25  # of float64, which is what a fold needs
_LEAST_ROWS = 256  # fewer columns at a time would read a page of a [D, F] matrix again and again
_UNKNOWN_DIGEST = "0" * 64  # of the same length as the one that takes its place


def convert(sae: Sae, target: Path, progress: Callable[[int], object] = lambda rows: None) -> Path:
    """Writes a canonical folder: the dictionary, and the checkpoint's labels as ``features.json`` where it has some.

    Everything is written into a temporary folder beside ``target`` and then renamed: there is never half a dictionary.

    Args:
        sae: The opened checkpoint.
        target: The folder to make; its parent must be there.
        progress: Is told the number of features that were written since it was told last.

    Raises:
        CheckpointError: ``target`` is there already or cannot be written, or a weight is not finite.
    """
    check_target(target)
    spec = folded(sae.spec)
    need = sum(4 * prod(shape) for shape in shapes(spec).values())
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise CheckpointError(f"{target} needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.")
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's is for its owner alone
        with (temporary / FILE).open("wb") as file:
            _write(sae, spec, file, progress)
            file.flush()
            os.fsync(file.fileno())
        labels = labels_file(sae.path)
        if labels.is_file():
            shutil.copyfile(labels, temporary / LABELS_FILE)
        temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / FILE


def check_target(target: Path) -> None:
    """Raises :class:`CheckpointError` where a folder cannot be made, or would take the place of something."""
    if os.path.lexists(target):
        raise CheckpointError(
            f"{target} is there already, and nothing is overwritten. Name a folder that is not there."
        )
    if not target.parent.is_dir():
        raise CheckpointError(f"{target} cannot be made: there is no folder {target.parent}.")
    if not os.access(target.parent, os.W_OK):
        raise CheckpointError(f"{target} cannot be made: {target.parent} is not writable.")


def _write(sae: Sae, spec: SaeSpec, file: BinaryIO, progress: Callable[[int], object]) -> None:
    header, begins = _header(sae, spec, _UNKNOWN_DIGEST)
    file.write(header)
    file.truncate(begins[DEC_BIAS] + 4 * spec.d_out)
    hashers = {name: hashlib.sha256() for name in begins}
    places = dict(begins)

    def append(name: str, values: Tensor) -> None:
        content = values.contiguous().numpy().astype("<f4", copy=False).tobytes()
        file.seek(places[name])
        file.write(content)
        places[name] += len(content)
        hashers[name].update(content)

    step = max(_LEAST_ROWS, _BLOCK_BYTES // (8 * (spec.d_in + spec.d_out)))
    names = [field.name for field in fields(FeatureRows) if field.name != "ids"]
    for start in range(0, spec.n_features, step):
        rows = sae.rows(range(start, min(start + step, spec.n_features)))
        for name in names:
            append(name, getattr(rows, name))
        progress(len(rows.ids))
    append(DEC_BIAS, sae.decoder_bias())
    digest = combined_digest({name: hasher.hexdigest() for name, hasher in hashers.items()})
    file.seek(0)
    file.write(_header(sae, spec, digest)[0])


def _header(sae: Sae, spec: SaeSpec, digest: str) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where in the file each tensor begins."""
    metadata = header_metadata(spec, source_family=sae.spec.family, source_fingerprint=sae.fingerprint, digest=digest)
    entries: dict[str, object] = {"__metadata__": metadata}
    offsets: dict[str, int] = {}
    end = 0
    for name, shape in shapes(spec).items():
        offsets[name], end = end, end + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}
