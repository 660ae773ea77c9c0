"""The SAE of DeepSeek-R1-Distill-Llama-8B by qresearch: one ``.pt`` whose name says model and layer.

Layout: ``encoder.weight [F, D]``, ``encoder.bias [F]``, ``decoder.weight [D, F]``, ``decoder.bias [D]``; ReLU, nothing
subtracted, no normalisation, the layer's output. Other families have the same names with a configuration beside them,
and another forward, so that without the published name nothing is assumed.
"""

import re
from pathlib import Path

from sae_steer.errors import CheckpointError
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "deepseek_r1"
_LAYOUT = {"encoder.bias": "F", "decoder.bias": "D", "encoder.weight": "F D", "decoder.weight": "D F"}
_NAME = re.compile(r"(?P<model>DeepSeek-R1-Distill-Llama-8B)-SAE-l(?P<layer>\d{1,5})(?!\d)")


def recognises(location: Location) -> bool:
    """Whether a place has one ``.pt`` with these tensors and no others, of that name or in a folder of it."""
    path = location.only(".pt")
    return path is not None and _name(path) is not None and location.peek(path).keys() == _LAYOUT.keys()


def open_file(location: Location) -> FileSae:
    """Opens such a file; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(".pt")
    name = _name(path) if path is not None else None
    if path is None or name is None:
        raise CheckpointError(
            f"{location.path}: needed is one .pt file, it or its folder named as is "
            "DeepSeek-R1-Distill-Llama-8B-SAE-l19."
        )
    file = location.open(path)
    tensors = file.tensors
    fit_shapes(tensors, _LAYOUT, path, needed_by=FAMILY_NAME)
    weights = Weights(
        enc=tensors["encoder.weight"],
        dec=tensors["decoder.weight"].T,
        dec_bias=tensors["decoder.bias"],
        bias=tensors["encoder.bias"],
        subtracts_decoder_bias=False,
    )
    place = Place(Kind.RESID_POST, int(name["layer"]))
    return assemble(
        path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="relu",
        activation=Activation.RELU,
        site=Site(place, place),
        model_name=name["model"],
        notes=("layer and model are from the name: the file does not hold them",),
    )


FAMILY = Family(
    FAMILY_NAME, f"one DeepSeek-R1-...-SAE-l<n>.pt with {', '.join(_LAYOUT)} and nothing else", recognises, open_file
)


def _name(path: Path) -> re.Match[str] | None:
    """The published name, of the file or of a folder above it; none where a configuration says otherwise."""
    if any((path.parent / name).exists() for name in ("config.json", "cfg.json", "hyperparams.json")):
        return None
    matches = (_NAME.search(part) for part in reversed(path.absolute().parts))
    return next((match for match in matches if match is not None), None)
