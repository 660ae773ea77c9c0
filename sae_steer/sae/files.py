"""Files of a checkpoint: JSON and safetensors read without trust, and an SAE that lives in them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_steer.errors import CheckpointError, UnknownFeature
from sae_steer.sae.pickles import refuse_pickle
from sae_steer.sae.record import FeatureRows, SaeSpec
from sae_steer.sae.weights import Weights

MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FileSae:
    """An :class:`~sae_steer.sae.record.Sae` over one mapped weights file; arguments and methods as stated there.

    Args:
        weights: The dictionary, as views of ``tensors``.
        tensors: The file's tensors under their own names.
        file: The weights file.
        identity: What it was when it was opened; see :func:`identity_of`.
    """

    spec: SaeSpec
    path: Path
    fingerprint: str
    weights: Weights
    tensors: Mapping[str, Tensor]
    file: Path
    identity: tuple[int, int, int] | None

    def rows(self, ids: Sequence[int]) -> FeatureRows:
        """Canonical rows; raises :class:`UnknownFeature` and, for weights that are not finite, CheckpointError."""
        count = self.spec.n_features
        unknown = next((feature for feature in ids if not 0 <= feature < count), None)
        if unknown is not None:
            raise UnknownFeature(f"There is no feature {unknown}: this dictionary has features 0 to {count - 1}.")
        now = identity_of(self.file)
        # Replaced by rename, the mapped file is still whole; changed in place, it is not what was fingerprinted.
        if now is not None and self.identity is not None and now[0] == self.identity[0] and now != self.identity:
            raise CheckpointError(
                f"{self.file} was changed while it was in use, so its fingerprint is no longer true. Restart; to "
                "replace a dictionary, write a new file and rename it into place."
            )
        rows = self.weights.rows(torch.tensor(ids, dtype=torch.int64))
        for name in ("enc", "dec", "bias", "theta", "mag_scale", "mag_bias", "enc_sum"):
            values: Tensor = getattr(rows, name)
            finite = values.isfinite() if values.ndim == 1 else values.isfinite().all(dim=1)
            if not bool(finite.all()):
                bad = rows.ids[~finite][:5].tolist()
                raise CheckpointError(
                    f"{self.path}: weights of features {bad} are not finite ({name}). "
                    "The file is damaged, or its training diverged; use other features or another file."
                )
        return rows

    def decoder_bias(self) -> Tensor:
        """``[D_out]`` float32; raises :class:`CheckpointError` where it is not finite."""
        bias = self.weights.dec_bias.double().float()
        if not bool(bias.isfinite().all()):
            raise CheckpointError(f"{self.path}: the decoder bias is not finite. The file is damaged.")
        return bias

    def raw(self) -> Mapping[str, Tensor]:
        """Copies of all tensors as float64."""
        return {name: tensor.double().clone() for name, tensor in self.tensors.items()}


def identity_of(file: Path) -> tuple[int, int, int] | None:
    """Inode, size and time of change of a file; None where it is gone."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """The JSON object in a file of at most ``limit`` bytes; raises :class:`CheckpointError` for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise CheckpointError(f"{path} is larger than {limit} bytes, the most that is read.")
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; needed is an object.")
    return value


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: pages are read when values are used.

    Raises:
        UnsafeCheckpoint: The file is a pickle, whatever its name says.
        CheckpointError: It is damaged or not there.
    """
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def fingerprint(weights: Path, spec: SaeSpec) -> str:
    """``sha256:...`` of a weights file and of all that was parsed beside it; notes are prose, and left out."""
    parsed = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "notes"}
    text = json.dumps(parsed, sort_keys=True, separators=(",", ":"), default=str)  # a Site by its grammar
    try:
        with weights.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from error
    return "sha256:" + hashlib.sha256(f"{content}\n{text}".encode()).hexdigest()
