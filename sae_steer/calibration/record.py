"""A calibration: how chosen features of one SAE are distributed given each concept; the file beside a profile.

``profile.json`` says what it was made from, in its block ``calibration``, and names the content of
``profile.safetensors``, so that neither is ever used with another. The file is written first: a profile that was
interrupted is no profile.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sae_steer.calibration.info import CalibrationInfo
from sae_steer.errors import CheckpointError
from sae_steer.whole_files import write_whole

CALIBRATION_FILE = "profile.safetensors"
MAX_CALIBRATION_BYTES = 2**30

_DTYPES = {
    "features": torch.int64,
    "width": torch.float32,
    "log_density": torch.float32,
    "fired": torch.int64,
    "mean": torch.float32,
    "std": torch.float32,
    "auroc": torch.float32,
    "separability": torch.float32,
    "rank": torch.int32,
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of ``K`` features and ``C`` concepts, in the order of the labels; densities are of one observation each.

    Args:
        features: ``[K]`` int64, their numbers in the SAE, rising.
        width: ``[K]`` float32, width of a bin; bin b is ``(b width, (b + 1) width]``, the last one has all beyond it.
        log_density: ``[K, C, 1 + B]`` float32, ``log P(bin | concept)``: first the atom ``f <= 0``, then the bins. The
            atom's mass is what keeps a concept's firing rate in the posterior.
        fired: ``[K, C]`` int64, observations with ``f > 0``.
        mean: ``[K, C]`` float32, mean of those; 0 where there are none.
        std: ``[K, C]`` float32, their standard deviation.
        auroc: ``[K, C]`` float32, probability that an observation of the concept is above one of another concept.
        separability: ``[K]`` float32, mean Jensen-Shannon distance over pairs of concepts, in [0, 1].
        rank: ``[K, C]`` int32, place of a feature among those chosen for a concept, from 0; -1 = not chosen for it.
    """

    features: Tensor
    width: Tensor
    log_density: Tensor
    fired: Tensor
    mean: Tensor
    std: Tensor
    auroc: Tensor
    separability: Tensor
    rank: Tensor

    @property
    def bins(self) -> int:
        """``B``."""
        return self.log_density.shape[2] - 1

    def chosen(self, concept: int) -> Tensor:
        """Rows of the features chosen for a concept ``[n]`` int64, the best first."""
        rank = self.rank[:, concept]
        held = (rank >= 0).nonzero()[:, 0]
        return held[rank[held].argsort()]

    def to_bytes(self) -> bytes:
        """The content of ``profile.safetensors``, the same for the same calibration."""
        return save({field.name: getattr(self, field.name).contiguous() for field in fields(self)})

    def write(self, folder: Path) -> str:
        """Writes ``profile.safetensors`` into an existing folder, whole or not at all; its digest ``sha256:...``."""
        content = self.to_bytes()
        write_whole(folder / CALIBRATION_FILE, content)
        return digest_of(content)

    @classmethod
    def read(cls, folder: Path, info: CalibrationInfo) -> Self:
        """Reads the file beside a profile; raises :class:`CheckpointError` unless it is what ``info`` says."""
        path = folder / CALIBRATION_FILE
        try:
            size = path.stat().st_size
            if size > MAX_CALIBRATION_BYTES:
                raise CheckpointError(
                    f"{path.name} has {size} bytes; a calibration has {MAX_CALIBRATION_BYTES} at most."
                )
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror or type(error).__name__}.") from error
        if digest_of(content) != info.file:
            raise CheckpointError(
                f"{path.name} is not the file that profile.json was written with ({info.file}). Calibrate again, or "
                "put both files back together."
            )
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is not a safetensors file: {error}") from error
        fault = _fault(tensors, info)
        if fault is not None:
            raise CheckpointError(f"{path.name} is not a calibration: {fault}.")
        return cls(**{name: tensors[name] for name in _DTYPES})


def digest_of(content: bytes) -> str:
    """``sha256:...`` of bytes."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _fault(tensors: dict[str, Tensor], info: CalibrationInfo) -> str | None:
    """What is wrong with a file's tensors, in words; None where nothing is."""
    if tensors.keys() != _DTYPES.keys():
        return f"it has the tensors {sorted(tensors)}, needed are {sorted(_DTYPES)}"
    count, concepts, bins = tensors["features"].numel(), len(info.labels), info.settings.bins
    pair = (count, concepts)
    shapes = {"log_density": (count, concepts, 1 + bins)} | dict.fromkeys(
        ("fired", "mean", "std", "auroc", "rank"), pair
    )
    for name, dtype in _DTYPES.items():
        tensor, shape = tensors[name], shapes.get(name, (count,))
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, needed is {dtype} {list(shape)}"
        if dtype == torch.float32 and not bool(tensor.isfinite().all()):
            return f"{name} is not finite"
    if count == 0 or bool((tensors["features"].diff() <= 0).any()) or int(tensors["features"][0]) < 0:
        return "its features are not rising numbers"
    if bool((tensors["width"] <= 0).any()):
        return "a bin has no width"
    total = tensors["log_density"].double().logsumexp(dim=2)
    if float(total.abs().max()) > math.log1p(1e-3):
        return "a density does not sum to one"
    return None
