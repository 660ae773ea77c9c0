"""Goodfire: one ``.pt`` or ``.pth`` state dict of ``encoder_linear`` and ``decoder_linear``.

Layout: ``encoder_linear.weight [F, D]``, ``encoder_linear.bias [F]``, ``decoder_linear.weight [D, F]``,
``decoder_linear.bias [D]``; ReLU, nothing subtracted, at a layer's output. Model and layer are those of the file's
name, such as ``Llama-3.1-8B-Instruct-SAE-l19.pth``.
"""

import re

from sae_steer.errors import CheckpointError
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "goodfire"
_LAYOUT = {
    "encoder_linear.bias": "F",
    "decoder_linear.bias": "D",
    "encoder_linear.weight": "F D",
    "decoder_linear.weight": "D F",
}
_FILE = re.compile(r"(?P<model>.+)-SAE-l(?P<layer>\d{1,5})")


def recognises(location: Location) -> bool:
    """Whether a place has one torch file with these tensors."""
    return location.peek(location.only(".pt", ".pth")).keys() >= _LAYOUT.keys()


def open_file(location: Location) -> FileSae:
    """Opens the file; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(".pt", ".pth")
    if path is None:
        raise CheckpointError(f"{location.path}: needed is one .pt or .pth file. Name the file.")
    file = location.open(path)
    tensors = file.tensors
    fit_shapes(tensors, _LAYOUT, path, needed_by=FAMILY_NAME)
    weights = Weights(
        enc=tensors["encoder_linear.weight"],
        dec=tensors["decoder_linear.weight"].T,
        dec_bias=tensors["decoder_linear.bias"],
        bias=tensors["encoder_linear.bias"],
        subtracts_decoder_bias=False,
    )
    named = _FILE.fullmatch(path.stem)
    place = Place(Kind.RESID_POST, int(named["layer"])) if named else None
    return assemble(
        path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="standard",
        activation=Activation.RELU,
        site=Site(place, place) if place is not None else None,
        model_name=named["model"] if named else None,
    )


FAMILY = Family(FAMILY_NAME, f"one .pt or .pth file with {', '.join(sorted(_LAYOUT))}", recognises, open_file)
