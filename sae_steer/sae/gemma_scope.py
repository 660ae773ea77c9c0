"""Gemma Scope: one ``params.npz`` for each SAE, in folders that say the rest.

Layout: ``W_enc [D, F]``, ``W_dec [F, D_out]``, ``b_enc [F]``, ``b_dec [D_out]``, ``threshold [F]``, some files with
small ``w``; JumpReLU, nothing subtracted, no normalisation. There is no configuration: model and place are those of a
path such as ``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz``, as on the hub and in its cache.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "gemma_scope"
_NAMES = frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "threshold"})
_REPOSITORY = re.compile(
    r"(?:.*--)?gemma-scope-(?P<model>\d+b-(?:pt|it))-(?P<kind>res|mlp|att|transcoders)(?:-canonical)?"
)
_LAYER = re.compile(r"layer_(?P<layer>\d{1,5})")
_KINDS = {"res": Kind.RESID_POST, "mlp": Kind.MLP_OUT, "att": Kind.Z}


def recognises(location: Location) -> bool:
    """Whether a place has one archive with these arrays."""
    return {_usual(name) for name in location.peek(location.only(".npz"))} >= _NAMES


def open_archive(location: Location) -> FileSae:
    """Opens an archive; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(".npz")
    if path is None:
        raise CheckpointError(f"{location.path}: needed is one .npz file. Name the archive.")
    file = location.open(path)
    tensors = _usual_names(file.tensors, path)
    site, model, transcoder, notes = _from_path(path)
    layout = {"b_enc": "F", "b_dec": "D_out", "W_enc": "D F", "W_dec": "F D_out", "threshold": "F"}
    if not transcoder:
        layout = {name: letters.replace("D_out", "D") for name, letters in layout.items()}
    fit_shapes(tensors, layout, path, needed_by=FAMILY_NAME)
    if "scaling_factor" in tensors and not bool((tensors["scaling_factor"] == 1).all()):
        raise UnsupportedCheckpoint(f"{path}: scaling_factor is not 1 everywhere, which no published file has.")
    weights = Weights(
        enc=tensors["W_enc"].T,
        dec=tensors["W_dec"],
        dec_bias=tensors["b_dec"],
        bias=tensors["b_enc"],
        subtracts_decoder_bias=False,
        theta=tensors["threshold"],
    )
    return assemble(
        path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        activation=Activation.JUMPRELU,
        site=site,
        model_name=model,
        notes=notes,
    )


FAMILY = Family(FAMILY_NAME, f"one .npz with {', '.join(sorted(_NAMES))}", recognises, open_archive)


def _usual(name: str) -> str:
    return {"w_enc": "W_enc", "w_dec": "W_dec"}.get(name, name)


def _usual_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    named = {_usual(name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise CheckpointError(f"{path} holds an array as W_ and as w_; remove the one that is not meant.")
    return named


def _from_path(path: Path) -> tuple[Site | None, str | None, bool, tuple[str, ...]]:
    """Site, model, whether it is a transcoder, and notes, by the names of the folders."""
    parts = path.absolute().parent.parts
    at = next((i for i in reversed(range(len(parts))) if _REPOSITORY.fullmatch(parts[i])), None)
    repository = _REPOSITORY.fullmatch(parts[at]) if at is not None else None
    if at is None or repository is None:
        return None, None, False, ()
    inside = parts[at + 1 :]
    layer = next((int(match["layer"]) for part in inside if (match := _LAYER.fullmatch(part))), None)
    if "embedding" in inside:
        raise UnsupportedCheckpoint(
            f"{path} is an SAE of the embeddings before the model multiplies them by sqrt(D), which is no site here."
        )
    model = f"google/gemma-2-{repository['model']}"
    if repository["kind"] == "transcoders":
        note = (
            "it reads the MLP's input before or after the norm's gain, which no file says: name the site only where "
            "that was found out, as in mlp_in.20->mlp_out.20"
        )
        return None, model, True, (note,)
    if layer is None:
        return None, model, False, ()
    place = Place(_KINDS[repository["kind"]], layer)
    return Site(place, place), model, False, ()
