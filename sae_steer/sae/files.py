"""Files of a checkpoint: read without trust, weights mapped; and an SAE that lives in them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_steer.errors import CheckpointError, UnknownFeature, UnsupportedCheckpoint
from sae_steer.sae.npz_files import map_npz
from sae_steer.sae.pickles import refuse_pickle
from sae_steer.sae.record import Activation, FeatureRows, SaeSpec
from sae_steer.sae.torch_files import map_torch
from sae_steer.sae.weights import RowSource, Weights

MAX_CONFIG_BYTES = 2**20
WEIGHTS_SUFFIXES = frozenset({".safetensors", ".npz", ".pt", ".pth"})


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A weights file that was opened.

    Args:
        path: The file.
        values: What it holds by name: mapped tensors, and in a torch file also plain values.
        identity: What the file was just before it was opened; see :func:`identity_of`.
    """

    path: Path
    values: Mapping[str, object]
    identity: tuple[int, int, int] | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among its values."""
        return {name: value for name, value in self.values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class FileSae:
    """An :class:`~sae_steer.sae.record.Sae` over mapped weights files; arguments and methods as stated there.

    Args:
        weights: The dictionary, as views of the files' tensors.
        files: The weights files.
        digest: Hex SHA-256 that stands for the weights; None = that of the files' bytes, read when it is asked for.
        topk_threshold: ``[]``, the threshold that a TopK's file stores beside its k.
        parameters: Numbers that the forward depends on and that are neither in the weights nor in the spec.
    """

    spec: SaeSpec
    path: Path
    weights: RowSource
    files: tuple[MappedFile, ...]
    digest: str | None = None
    topk_threshold: Tensor | None = None
    parameters: tuple[float, ...] = ()

    @property
    def fingerprint(self) -> str:
        """As stated there; reads the files whole, once, unless their digest is known. Raises CheckpointError."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = self.digest or "\n".join(_digest(file.path) for file in self.files)
        self._check_unchanged()
        if self.parameters:
            content += "\n" + json.dumps(self.parameters)
        return fingerprint_of(content, self.spec)

    def rows(self, ids: Sequence[int]) -> FeatureRows:
        """Canonical rows; raises :class:`UnknownFeature` and, for weights that are not finite, CheckpointError."""
        count = self.spec.n_features
        unknown = next((feature for feature in ids if not 0 <= feature < count), None)
        if unknown is not None:
            raise UnknownFeature(f"There is no feature {unknown}: this dictionary has features 0 to {count - 1}.")
        self._check_unchanged()
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

    def thresholded(self) -> "FileSae":
        """The same dictionary, its TopK taken for a JumpReLU at the threshold that is stored beside it.

        Raises:
            UnsupportedCheckpoint: It is no TopK, or stores no threshold.
        """
        if self.spec.activation is not Activation.TOPK or self.topk_threshold is None:
            raise UnsupportedCheckpoint(
                f"{self.path}: a threshold was asked for, and only a TopK that stores one has it."
            )
        note = f"TopK by its stored threshold, as was asked: exact is the rank among all features (k = {self.spec.k})"
        spec = replace(self.spec, activation=Activation.JUMPRELU, k=None, notes=(*self.spec.notes, note))
        assert isinstance(self.weights, Weights)  # only those have thresholds apart
        weights = replace(self.weights, theta=self.topk_threshold.expand(spec.n_features))
        return replace(self, spec=spec, weights=weights, topk_threshold=None)

    def dictionary(self) -> Mapping[str, Tensor]:
        """All of it, unfolded, under the names of the record."""
        return self.weights.unfolded()

    def raw(self) -> Mapping[str, Tensor]:
        """Copies of all tensors as float64."""
        tensors = {name: tensor for file in self.files for name, tensor in file.tensors.items()}
        return {name: tensor.to(torch.float64, copy=True) for name, tensor in tensors.items()}

    def _check_unchanged(self) -> None:
        for file in self.files:
            now = identity_of(file.path)
            # Replaced by rename, the mapped file is still whole; changed in place, it is not what was fingerprinted.
            if now is not None and file.identity is not None and now[0] == file.identity[0] and now != file.identity:
                raise CheckpointError(
                    f"{file.path} was changed while it was in use, so its fingerprint is no longer true. Restart; to "
                    "replace a dictionary, write a new file and rename it into place."
                )


def map_weights(path: Path, unpacked: Path | None = None) -> MappedFile:
    """Opens a weights file by its suffix: safetensors, torch's ``.pt`` and ``.pth``, or ``.npz``.

    Args:
        path: The file.
        unpacked: A folder into which an ``.npz`` that is compressed may be unpacked; None = it is refused.

    Raises:
        UnsafeCheckpoint: It is a pickle of more than tensors, whatever its name says.
        CheckpointError: It is damaged, not there, or not of a kind that can be mapped.
    """
    identity = identity_of(path)  # before anything of it is read
    match path.suffix.lower():
        case ".safetensors":
            return MappedFile(path, map_safetensors(path), identity)
        case ".npz":
            return MappedFile(path, map_npz(path, unpacked), identity)
        case ".pt" | ".pth":
            return MappedFile(path, map_torch(path), identity)
    refuse_pickle(path)
    raise CheckpointError(f"{path} is no weights file. Known are {', '.join(sorted(WEIGHTS_SUFFIXES))}.")


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


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def fingerprint_of(content: str, spec: SaeSpec) -> str:
    """``sha256:...`` of the digest of some weights and of what was parsed; notes are prose, and left out."""
    values = {field.name: (getattr(spec, field.name), field.default) for field in fields(spec) if field.name != "notes"}
    # Fields with a default came later: at it, they say nothing new, and fingerprints that were written down stay true.
    parsed = {name: value for name, (value, default) in values.items() if value != default}
    text = json.dumps(parsed, sort_keys=True, separators=(",", ":"), default=str)  # a Site by its grammar
    return "sha256:" + hashlib.sha256(f"{content}\n{text}".encode()).hexdigest()
