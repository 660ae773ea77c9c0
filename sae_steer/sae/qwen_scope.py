"""Qwen-Scope: ``SAE-Res-<model>-W<width>K-L0_<k>/layer<n>.sae.pt``, a TopK of each layer's output.

Layout: ``W_enc [F, D]``, ``W_dec [D, F]``, ``b_enc [F]``, ``b_dec [D]``; nothing subtracted, no normalisation. There is
no configuration: k and the width are in the repository's name alone. Source: the model cards, April 2026.
"""

import re
from pathlib import Path

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "qwen_scope"
_LAYOUT = {"b_enc": "F", "b_dec": "D", "W_enc": "F D", "W_dec": "D F"}
_SUFFIX = ".sae.pt"
_FILE = re.compile(r"layer(?P<layer>\d{1,5})\.sae\.pt")
# Also within the name that the hub's cache gives a repository's folder.
_REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>[1-9]\d{0,5})K-L0_(?P<k>[1-9]\d{0,5})(?!\d)")


def recognises(location: Location) -> bool:
    """Whether a place has one file of that name, with these tensors."""
    path = location.only(_SUFFIX)
    return path is not None and location.peek(path).keys() >= _LAYOUT.keys()


def open_file(location: Location) -> FileSae:
    """Opens such a file; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(_SUFFIX)
    layer = _FILE.fullmatch(path.name) if path is not None else None
    if path is None or layer is None:
        raise CheckpointError(f"{location.path}: needed is one file layer<n>{_SUFFIX}. Name the file.")
    file = location.open(path)
    tensors = file.tensors
    sizes = fit_shapes(tensors, _LAYOUT, path, needed_by=FAMILY_NAME)
    model, width, k = _repository(path)
    if sizes["F"] != width:
        raise CheckpointError(f"{path} has {sizes['F']} features, and by the name of its folder it should be {width}.")
    weights = Weights(
        enc=tensors["W_enc"],
        dec=tensors["W_dec"].T,
        dec_bias=tensors["b_dec"],
        bias=tensors["b_enc"],
        subtracts_decoder_bias=False,
    )
    place = Place(Kind.RESID_POST, int(layer["layer"]))
    return assemble(
        path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="topk",
        activation=Activation.TOPK,
        k=k,
        site=Site(place, place),
        model_name=model,
        notes=(
            f"k = {k} is from the folder's name: the file does not hold it",
            "a value below 0 among the k largest reads as 0 here, and the model card's snippet keeps it: they differ "
            "only on tokens with fewer than k positive pre-activations",
        ),
    )


FAMILY = Family(FAMILY_NAME, f"one layer<n>{_SUFFIX} with {', '.join(_LAYOUT)}", recognises, open_file)


def _repository(path: Path) -> tuple[str, int, int]:
    """Model, number of features and k, from the nearest folder that has them in its name."""
    for part in reversed(path.absolute().parts[:-1]):
        match = _REPOSITORY.search(part)
        if match is not None:
            width, k = int(match["width"]) * 1024, int(match["k"])
            if k > width:
                raise CheckpointError(f"{path}: by the name {part!r} k is {k}, of {width} features.")
            return match["model"], width, k
    raise UnsupportedCheckpoint(
        f"{path}: k is in no file of this family, but in the name of its repository. Keep the file in a folder of that "
        "name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50."
    )
