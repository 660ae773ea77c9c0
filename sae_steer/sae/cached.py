"""Opens what a server serves; checkpoints that must be converted first are converted once, into the user's folder."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from filelock import FileLock
from tqdm import tqdm

from sae_steer.errors import CheckpointError, CompressedCheckpoint
from sae_steer.sae.convert import convert
from sae_steer.sae.open import open_sae
from sae_steer.sae.record import Sae


def open_served(
    location: str | Path,
    *,
    revision: str | None = None,
    topk: Literal["exact", "threshold"] = "exact",
    cache: Path | None = None,
) -> Sae:
    """Opens an SAE as :func:`open_sae` does, and a compressed one by its conversion.

    Args:
        location: As for :func:`open_sae`.
        revision: As for :func:`open_sae`.
        topk: As for :func:`open_sae`.
        cache: The folder of conversions, each under the digest of what it was made of and where that lay (which may
            tell its site), so that every process and every start finds it; None = compressed checkpoints are refused.

    Raises:
        UnsafeCheckpoint: It is a pickle of more than tensors.
        UnsupportedCheckpoint: It cannot be served as it is.
        CheckpointError: It is not there, it is damaged, or it cannot be converted.
    """
    try:
        return open_sae(location, revision=revision, topk=topk)
    except CompressedCheckpoint as error:
        if cache is None:
            raise
        archive = error.path
    if not cache.is_dir():
        raise CheckpointError(f"{cache}, where {archive} would be converted, is not a folder. Make it first.")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(str(archive.resolve()).encode())
    target = cache / f"{archive.stem}-{digest.hexdigest()[:16]}"
    try:
        # Processes of one server start together, and one of them converts.
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _convert(location, revision, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error}") from error
    return open_sae(target, topk=topk)


def _convert(location: str | Path, revision: str | None, target: Path) -> None:
    with TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as unpacked:
        sae = open_sae(location, revision=revision, unpacked=Path(unpacked))
        features = sae.spec.n_features
        with tqdm(
            total=features, desc=f"converting {location}", unit=" features", unit_scale=True, disable=None
        ) as bar:
            convert(sae, target, bar.update)
