"""From a location that a user names to an opened SAE."""

from pathlib import Path
from typing import Literal

from sae_steer.errors import CheckpointError
from sae_steer.sae import (
    canonical,
    deepseek_r1,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    layer_transcoders,
    llama_scope,
    openai_gpt2,
    openmoss,
    prisma,
    qwen_scope,
    saelens,
    sdxl_unbox,
    sparsify,
)
from sae_steer.sae.files import WEIGHTS_SUFFIXES
from sae_steer.sae.hub import download
from sae_steer.sae.location import Location
from sae_steer.sae.pickles import refuse_pickle
from sae_steer.sae.record import Sae
from sae_steer.sae.registry import Registry

FAMILIES = Registry()
for _family in (
    canonical.FAMILY,
    deepseek_r1.FAMILY,
    dictionary_learning.FAMILY,
    gemma_scope.FAMILY,
    gemma_scope_2.FAMILY,
    goodfire.FAMILY,
    layer_transcoders.FAMILY,
    llama_scope.FAMILY,
    openai_gpt2.FAMILY,
    openmoss.FAMILY,
    prisma.FAMILY,
    qwen_scope.FAMILY,
    saelens.FAMILY,
    sdxl_unbox.FAMILY,
    sparsify.FAMILY,
):
    FAMILIES.add(_family)


def open_sae(
    location: str | Path,
    family: str | None = None,
    revision: str | None = None,
    *,
    topk: Literal["exact", "threshold"] = "exact",
    unpacked: Path | None = None,
) -> Sae:
    """Opens an SAE; its rows are read later, as they are asked for.

    Args:
        location: A folder or a weights file, or else a place on the Hugging Face hub:
            ``org/repo[/sub/folder][/file][@revision]``.
        family: The checkpoint family; None = told from the files.
        revision: Branch, tag or commit on the hub, instead of ``@revision``.
        topk: ``threshold`` = compute a TopK by the threshold that its file stores, which needs no other feature and is
            an approximation; refused where the file stores none.
        unpacked: A folder for the arrays of an ``.npz`` that is compressed, which must stay while the SAE is used;
            None = such files are refused.

    Raises:
        UnsafeCheckpoint: It is a pickle of more than tensors.
        UnsupportedCheckpoint: Its family cannot be told, or its forward is not one that is computed exactly.
        CheckpointError: It is not there, or its files are damaged.
    """
    place = Location(_path(location, revision), unpacked)
    reader = FAMILIES.sniff(place) if family is None else FAMILIES.named(family)
    sae = reader.open(place)
    return sae.thresholded() if topk == "threshold" else sae


def _path(location: str | Path, revision: str | None) -> Path:
    path = Path(location).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{path} is here, and has no revisions. Leave the revision out.")
        if path.is_file() and path.suffix.lower() not in WEIGHTS_SUFFIXES:
            refuse_pickle(path)
            known = ", ".join(sorted(WEIGHTS_SUFFIXES))
            raise CheckpointError(f"{path} is no weights file ({known}). Name that, or the folder of the SAE's files.")
        return path
    if isinstance(location, Path) or path.is_absolute() or location.startswith((".", "~")):
        raise CheckpointError(f"There is no folder or file {path}.")
    return download(location, revision)
