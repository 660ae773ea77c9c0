"""From a location that a user names to an opened SAE."""

from pathlib import Path

from sae_steer.errors import CheckpointError
from sae_steer.sae import saelens
from sae_steer.sae.hub import download
from sae_steer.sae.pickles import refuse_pickle
from sae_steer.sae.record import Sae
from sae_steer.sae.registry import Registry

FAMILIES = Registry()
FAMILIES.add(saelens.FAMILY)


def open_sae(location: str | Path, family: str | None = None, revision: str | None = None) -> Sae:
    """Opens an SAE; its rows are read later, as they are asked for.

    Args:
        location: A folder, or else a place on the Hugging Face hub: ``org/repo[/sub/folder][@revision]``.
        family: The checkpoint family; None = told from the files.
        revision: Branch, tag or commit on the hub, instead of ``@revision``.

    Raises:
        UnsafeCheckpoint: It is a pickle.
        UnsupportedCheckpoint: Its family cannot be told, or its forward is not one that is computed exactly.
        CheckpointError: It is not there, or its files are damaged.
    """
    folder = _folder(location, revision)
    reader = FAMILIES.sniff(folder) if family is None else FAMILIES.named(family)
    return reader.open(folder)


def _folder(location: str | Path, revision: str | None) -> Path:
    path = Path(location).expanduser()
    if path.is_file():
        refuse_pickle(path)
        raise CheckpointError(f"{path} is a file. Name the folder that holds the SAE's files.")
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder, which has no revisions. Leave the revision out.")
        return path
    if isinstance(location, Path) or path.is_absolute() or location.startswith((".", "~")):
        raise CheckpointError(f"There is no folder {path}.")
    return download(location, revision)
