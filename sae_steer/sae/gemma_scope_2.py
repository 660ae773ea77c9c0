"""Gemma Scope 2: ``params.safetensors`` and mostly ``config.json``, in a folder for each SAE or transcoder.

Layout: ``w_enc [D, F]``, ``w_dec [F, D_out]``, ``b_enc [F]``, ``b_dec [D_out]``, ``threshold [F]``, affine transcoders
also ``affine_skip_connection [D, D_out]``; JumpReLU, nothing subtracted, no normalisation. Without ``config.json`` the
place is that of a path such as ``gemma-scope-2-4b-it/resid_post/layer_12_width_16k_l0_small``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae_steer.errors import CheckpointError, SiteError, UnsupportedCheckpoint
from sae_steer.sae.assemble import NO_SITE, assemble
from sae_steer.sae.files import FileSae, read_json
from sae_steer.sae.hook_points import place_of_module
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "gemma_scope_2"
CONFIG_FILE = "config.json"
_NAMES = frozenset({"w_enc", "w_dec", "b_enc", "b_dec", "threshold"})
_SKIP = "affine_skip_connection"
_SUBFOLDER = re.compile(r"(?P<kind>resid_post|attn_out|mlp_out|transcoder)(?:_all)?")
_FOLDER = re.compile(r"layer_(?P<layer>\d{1,5})_width_.+")
_KINDS = {"resid_post": Kind.RESID_POST, "attn_out": Kind.Z, "mlp_out": Kind.MLP_OUT}


def recognises(location: Location) -> bool:
    """Whether a place has one safetensors file with these tensors."""
    return location.peek(location.only(".safetensors")).keys() >= _NAMES


def open_folder(location: Location) -> FileSae:
    """Opens an SAE or a transcoder; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(".safetensors")
    if path is None:
        raise CheckpointError(f"{location.path}: needed is one .safetensors file. Name the file.")
    file = location.open(path)
    tensors = file.tensors
    config = None
    if location.has(CONFIG_FILE):
        config = Settings(read_json(location.folder / CONFIG_FILE), location.folder / CONFIG_FILE)
    site, transcoder, notes = _from_config(config) if config is not None else _from_path(path)
    affine = _check(tensors, config, transcoder, path)
    weights = Weights(
        enc=tensors["w_enc"].T,
        dec=tensors["w_dec"],
        dec_bias=tensors["b_dec"],
        bias=tensors["b_enc"],
        subtracts_decoder_bias=False,
        theta=tensors["threshold"],
    )
    return assemble(
        location.folder if path.name == "params.safetensors" else path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="jump_relu"
        + (" transcoder" if transcoder else "")
        + (" with affine connection" if affine else ""),
        activation=Activation.JUMPRELU,
        site=site,
        model_name=config.text("model_name") if config is not None else None,
        skip=affine,
        notes=notes,
    )


FAMILY = Family(FAMILY_NAME, f"one .safetensors with {', '.join(sorted(_NAMES))}", recognises, open_folder)


def _check(tensors: Mapping[str, Tensor], config: Settings | None, transcoder: bool, path: Path) -> bool:
    """Whether there is an affine connection; refuses what does not fit together."""
    if "w_dec" in tensors and tensors["w_dec"].ndim == 3:
        raise UnsupportedCheckpoint(
            f"{path}: w_dec has the shape {list(tensors['w_dec'].shape)}: a cross-layer transcoder, whose features "
            "write at several layers, and an edit here has one place to write."
        )
    affine = _SKIP in tensors
    if config is not None and config.flag("affine_connection", affine) != affine:
        raise CheckpointError(
            f"{path} {'holds' if affine else 'lacks'} {_SKIP}, and by {CONFIG_FILE} affine_connection is {not affine}."
        )
    layout = {"b_enc": "F", "b_dec": "D_out", "w_enc": "D F", "w_dec": "F D_out", "threshold": "F"}
    if affine:
        layout[_SKIP] = "D D_out"
    if not transcoder:
        layout = {name: letters.replace("D_out", "D") for name, letters in layout.items()}
    fit_shapes(tensors, layout, path, needed_by=FAMILY_NAME)
    return affine


def _from_config(config: Settings) -> tuple[Site | None, bool, tuple[str, ...]]:
    """Site, whether it may be a transcoder, and notes, by the hook points of a configuration."""
    if config.text("architecture") != "jump_relu":
        raise config.refusal("architecture", "known is jump_relu")
    hook_in, hook_out = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    transcoder = hook_out is not None and hook_out != hook_in
    if hook_in is None:
        return None, transcoder, (NO_SITE,)
    try:
        read = place_of_module(hook_in)
        return Site(read, place_of_module(hook_out) if hook_out is not None else read), transcoder, ()
    except SiteError as error:
        return None, transcoder, (f"{error.message} Name the site.",)


def _from_path(path: Path) -> tuple[Site | None, bool, tuple[str, ...]]:
    """The same by the names of the folders."""
    parts = path.absolute().parts[-3:-1]
    kind, layer = (pattern.fullmatch(part) for pattern, part in zip((_SUBFOLDER, _FOLDER), parts, strict=True))
    if kind is None or layer is None:
        return None, True, (NO_SITE,)
    number = int(layer["layer"])
    if kind["kind"] == "transcoder":
        return Site(Place(Kind.MLP_IN, number), Place(Kind.MLP_OUT, number)), True, ()
    place = Place(_KINDS[kind["kind"]], number)
    return Site(place, place), False, ()
