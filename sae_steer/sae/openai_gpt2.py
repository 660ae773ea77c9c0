"""OpenAI's SAEs of GPT-2 small: ``<location>[_<version>]/autoencoders/<layer>.pt``.

Layout: ``pre_bias [D]``, ``encoder.weight [F, D]``, ``latent_bias [F]``, ``decoder.weight [D, F]``, buffers of
statistics, and in later files ``activation`` with ``activation_state_dict``. The bias is subtracted, and added again; a
TopK normalises its input first, by the layer norm of the record. Source: openai/sparse_autoencoder, ``model.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation, InputNorm
from sae_steer.sae.registry import Family
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "openai_gpt2"
_LAYOUT = {"pre_bias": "D", "latent_bias": "F", "encoder.weight": "F D", "decoder.weight": "D F"}
# The statistics that only these files have: others share the names of the weights.
_STATISTICS = "latents_activation_frequency"
_FOLDER = re.compile(
    r"(?P<place>mlp_post_act|resid_delta_attn|resid_delta_mlp|resid_post_attn|resid_post_mlp)(?:_v\w+)?"
)
_KINDS = {
    "resid_delta_attn": Kind.ATTN_OUT,
    "resid_delta_mlp": Kind.MLP_OUT,
    "resid_post_attn": Kind.RESID_MID,
    "resid_post_mlp": Kind.RESID_POST,
}


def recognises(location: Location) -> bool:
    """Whether a place has one ``.pt`` with these weights, and with what only these files have beside them."""
    names = location.peek(location.only(".pt")).keys()
    return names >= _LAYOUT.keys() and (_STATISTICS in names or "activation" in names)


def open_file(location: Location) -> FileSae:
    """Opens such a file; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(".pt")
    if path is None:
        raise CheckpointError(f"{location.path}: needed is one .pt file. Name the file.")
    file = location.open(path)
    tensors = file.tensors
    sizes = fit_shapes(tensors, _LAYOUT, path, needed_by=FAMILY_NAME)
    activation, k = _activation(file.values, path)
    if k is not None and not 1 <= k <= sizes["F"]:
        raise CheckpointError(f"{path}: k is {k}; needed is 1 to {sizes['F']}, the number of features.")
    weights = Weights(
        enc=tensors["encoder.weight"],
        dec=tensors["decoder.weight"].T,
        dec_bias=tensors["pre_bias"],
        bias=tensors["latent_bias"],
        subtracts_decoder_bias=True,
    )
    site, notes = _site(path)
    return assemble(
        path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="topk" if k is not None else "relu",
        activation=activation,
        k=k,
        input_norm=InputNorm.LAYER_NORM if k is not None else InputNorm.NONE,
        site=site,
        model_name="gpt2" if site is not None else None,
        notes=notes,
    )


FAMILY = Family(
    FAMILY_NAME, f"one .pt with {', '.join(_LAYOUT)} and activation or {_STATISTICS}", recognises, open_file
)


def _activation(values: Mapping[str, object], path: Path) -> tuple[Activation, int | None]:
    name = values.get("activation", "ReLU")
    if name == "ReLU":
        return Activation.RELU, None
    if name != "TopK":
        raise UnsupportedCheckpoint(f"{path}: activation is {name!r}, which is refused: known are ReLU and TopK.")
    state = values.get("activation_state_dict")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} lacks activation_state_dict, which a TopK needs.")
    after = state.get("postact_fn")
    if after != "ReLU":
        raise UnsupportedCheckpoint(
            f"{path}: activation_state_dict.postact_fn is {after!r}, which is refused: without ReLU a feature may be "
            "negative, and a TopK here is not."
        )
    k = state.get("k")
    if isinstance(k, Tensor) and k.numel() == 1 and not k.is_floating_point():
        k = int(k)
    if isinstance(k, bool) or not isinstance(k, int):
        raise CheckpointError(f"{path}: activation_state_dict.k is {k!r}; needed is a whole number.")
    return Activation.TOPK, k


def _site(path: Path) -> tuple[Site | None, tuple[str, ...]]:
    """The site, by the file's own name and that of the folder above ``autoencoders``."""
    parts = path.absolute().parts
    match = _FOLDER.fullmatch(parts[-3]) if len(parts) > 3 and parts[-2] == "autoencoders" else None
    if match is None or not path.stem.isdecimal():
        return None, ("the place is in the path of the published file, LOCATION/autoencoders/LAYER.pt: name the site",)
    if match["place"] not in _KINDS:
        return None, ("it reads the MLP's hidden layer after its activation function, for which there is no site here",)
    place = Place(_KINDS[match["place"]], int(path.stem))
    return Site(place, place), ()
