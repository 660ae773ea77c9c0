"""Writes a calibration as a profile: ``NAME/profile.safetensors``, then ``NAME/profile.json``, which names its content.

Whoever is interrupted between the two leaves no profile, or an old ``profile.json`` that no longer fits and is refused.
"""

import re
from pathlib import Path
from typing import Literal

from sae_steer.calibration.info import CalibrationInfo
from sae_steer.calibration.record import Calibration
from sae_steer.closed import NAME_PATTERN
from sae_steer.errors import DataError
from sae_steer.schema import AppEdit, Intervention, Profile
from sae_steer.whole_files import write_whole

PROFILE_FILE = "profile.json"


def check_target(folder: Path, *, force: bool) -> None:
    """Raises :class:`DataError` where a profile cannot be written to ``folder``, or one is there already."""
    if not re.fullmatch(NAME_PATTERN, folder.name):
        raise DataError(
            f"{folder.name!r} is not a name for a profile. Names start with a letter or digit and go on with letters, "
            "digits, '_', '.' and '-'."
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder} is in the way, and no folder.")
    if (folder / PROFILE_FILE).exists() and not force:
        raise DataError(f"There is a profile in {folder}. Choose another name, or replace it with --force.")


def write_profile(
    folder: Path,
    calibration: Calibration,
    info: CalibrationInfo,
    *,
    description: str,
    strength: float = 1.0,
    prior: Literal["uniform", "target", "empirical"] = "uniform",
    skip_bos: bool = False,
    force: bool = False,
) -> Profile:
    """Writes the profile that suppresses the calibration's concepts.

    Args:
        folder: Its folder, whose name is the profile's.
        calibration: The numbers.
        info: What they were made from; its ``file`` is set here.
        description: What the profile says of itself.
        strength: Exponent of the gain, in the profile's own edits.
        prior: Prior of the concepts, in the profile's own edits.
        skip_bos: Whether these leave beginning-of-sequence tokens alone.
        force: Whether a profile that is there is replaced.

    Raises:
        DataError: There is one already, or the folder cannot be written.
    """
    check_target(folder, force=force)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        info = info.model_copy(update={"file": calibration.write(folder)})
        edits: list[Intervention] = [
            AppEdit(
                op="app",
                sae=info.sae,
                calibration=folder.name,
                concept=concept,
                strength=strength,
                prior=prior,
                positions="all",
                skip_bos=skip_bos,
            )
            for concept in info.concepts
        ]
        profile = Profile(
            name=folder.name,
            description=description[:4096],
            interventions=edits,
            saes={info.sae: info.sae_fingerprint},
            calibration=info,
        )
        text = profile.model_dump_json(indent=1, exclude_defaults=True)
        write_whole(folder / PROFILE_FILE, text.encode())
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or type(error).__name__}.") from error
    return profile
