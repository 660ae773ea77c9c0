"""Resolves ``org/repo[/sub/folder][@revision]`` on the Hugging Face hub to a local folder."""

import glob
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from sae_steer.errors import CheckpointError

_LOCATION = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>[^@\s]+))?", re.ASCII)


def download(location: str, revision: str | None = None) -> Path:
    """The folder of one SAE, downloaded where it is not cached yet: safetensors and JSON, and no folder below it.

    Raises:
        CheckpointError: It is not a hub location, is not on the hub, or cannot be reached and is not cached.
    """
    match = _LOCATION.fullmatch(location)
    parts = match["folder"].split("/") if match and match["folder"] else []
    if match is None or {"", ".", ".."} & set(parts):
        raise CheckpointError(
            f"{location!r} is neither a folder here nor a place on the hub. Write org/repo[/folder][@revision]."
        )
    if revision is not None and match["revision"] is not None:
        raise CheckpointError(f"{location!r} names a revision, and {revision!r} is asked for besides. Give one.")
    # The hub's `*` matches slashes too: without the second list a repository of hundreds of SAEs would come whole.
    inside = "".join(glob.escape(part) + "/" for part in parts)
    try:
        root = snapshot_download(
            match["repo"],
            revision=revision or match["revision"],
            allow_patterns=[f"{inside}*.safetensors", f"{inside}*.json"],
            ignore_patterns=[f"{inside}*/*"],
        )
    except (OSError, ValueError) as error:  # the hub's own errors are subclasses of the two
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{location!r} is no folder here and could not be had from the Hugging Face hub: {reason} "
            "Check the name and the network, or download it where there is one and give the folder."
        ) from error
    folder = Path(root, *parts)
    if not folder.is_dir():
        raise CheckpointError(f"{match['repo']} on the hub holds no safetensors or JSON in {'/'.join(parts)!r}.")
    return folder
