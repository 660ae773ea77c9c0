"""Resolves ``org/repo[/sub/folder][/file][@revision]`` on the Hugging Face hub to a local folder or file."""

import glob
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from sae_steer.errors import CheckpointError
from sae_steer.sae.files import WEIGHTS_SUFFIXES

_CONFIGS = (".json", ".yaml", ".yml")
_ELSE = (".npz", ".pt", ".pth")
_LOCATION = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>[^@\s]+))?", re.ASCII)


def download(location: str, revision: str | None = None) -> Path:
    """The folder or the weights file of one SAE, downloaded where it is not cached yet.

    Of a folder come its configurations and its safetensors, or else its other weights, and no folder below it; of a
    file, the file and the configurations beside it and above it.

    Raises:
        CheckpointError: It is not a hub location, is not on the hub, or cannot be reached and is not cached.
    """
    match = _LOCATION.fullmatch(location)
    parts = match["folder"].split("/") if match and match["folder"] else []
    if match is None or {"", ".", ".."} & set(parts):
        raise CheckpointError(
            f"{location!r} is neither here nor a place on the hub. Write org/repo[/folder][/file][@revision]."
        )
    if revision is not None and match["revision"] is not None:
        raise CheckpointError(f"{location!r} names a revision, and {revision!r} is asked for besides. Give one.")
    revision = revision or match["revision"]
    if parts and Path(parts[-1]).suffix.lower() in WEIGHTS_SUFFIXES:
        beside = _inside(parts[:-1])
        wanted = [glob.escape("/".join(parts)), *(f"{beside}*{suffix}" for suffix in _CONFIGS), *_above(parts[:-1])]
        file = _fetch(location, match["repo"], revision, wanted, [f"{beside}*/*"]) / "/".join(parts)
        if not file.is_file():
            raise CheckpointError(f"{match['repo']} on the hub has no file {'/'.join(parts)!r}.")
        return file
    inside = _inside(parts)
    for suffixes in ((*_CONFIGS, ".safetensors"), _ELSE):  # where there are safetensors, nothing else comes
        wanted = [*(f"{inside}*{suffix}" for suffix in suffixes), *_above(parts)]
        # The hub's `*` matches slashes too: without this a repository of hundreds of SAEs would come whole.
        folder = _fetch(location, match["repo"], revision, wanted, [f"{inside}*/*"]) / "/".join(parts)
        if folder.is_dir() and any(entry.suffix.lower() in WEIGHTS_SUFFIXES for entry in folder.iterdir()):
            return folder
    raise CheckpointError(
        f"{match['repo']} on the hub holds no weights ({', '.join(sorted(WEIGHTS_SUFFIXES))}) in {'/'.join(parts)!r}. "
        "Name the folder, or the file, of one SAE."
    )


def _inside(parts: list[str]) -> str:
    return "".join(glob.escape(part) + "/" for part in parts)


def _above(parts: list[str]) -> list[str]:
    """Configurations of a whole run, in the folders above."""
    return [f"{_inside(parts[:n])}config.json" for n in range(len(parts))]


def _fetch(location: str, repo: str, revision: str | None, wanted: list[str], others: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=others))
    except (OSError, ValueError) as error:  # the hub's own errors are subclasses of the two
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{location!r} is not here and could not be had from the Hugging Face hub: {reason} "
            "Check the name and the network, or download it where there is one and give the folder."
        ) from error
