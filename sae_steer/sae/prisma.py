"""Prisma's SAEs of vision transformers: ``config.json`` beside ``n_images_<n>.pt`` or ``weights.pt``.

Layout: ``W_enc [D, F]``, ``W_dec [F, D]``, ``b_dec [D]``, ``b_enc [F]``; gated: ``b_gate``, ``b_mag``, ``r_mag``.
The decoder bias is always subtracted, after the normalisation, which is a layer norm where the configuration does not
say. Transcoders have another bias at their output, ``b_dec_out [D_out]``, and maybe ``W_skip [D_out, D]``; what they
write is scaled back by the norm of what they read. Source: Prisma-Multimodal/ViT-Prisma, the folder ``sae``.
"""

from collections.abc import Mapping
from dataclasses import replace

from sae_steer.errors import CheckpointError
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae, MappedFile, read_json
from sae_steer.sae.lens_hooks import lens_site
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation, InputNorm
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import check_tensors
from sae_steer.sae.weights import Weights

FAMILY_NAME = "prisma"
CONFIG_FILE = "config.json"
_KEYS = {"hook_point_layer", "layer_subtype", "d_in", "activation_fn_str"}
_NORMS = {
    "none": InputNorm.NONE,
    "layer_norm": InputNorm.LAYER_NORM,
    "constant_norm_rescale": InputNorm.NORM_RESCALE,
}
_ACTIVATIONS = {"relu": Activation.RELU, "tanh-relu": Activation.TANH_RELU, "topk": Activation.TOPK}


def recognises(location: Location) -> bool:
    """Whether there is a configuration of this family, and one ``.pt`` beside it."""
    return location.only(".pt") is not None and location.config(CONFIG_FILE).keys() >= _KEYS


def open_folder(location: Location) -> FileSae:
    """Opens such a folder; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(".pt")
    if path is None:
        raise CheckpointError(f"{location.path}: needed is one .pt file beside {CONFIG_FILE}. Name the file.")
    config = Settings(read_json(location.folder / CONFIG_FILE), location.folder / CONFIG_FILE)
    if config.values.get("hook_point_head_index") is not None:
        raise config.refusal("hook_point_head_index", "an SAE of a single attention head has no site here")
    file = _unwrapped(location.open(path))
    tensors = file.tensors
    width, features = config.count("d_in"), _features(config)
    activation, k = _activation(config, features)
    gated, transcoder = activation is Activation.GATED, config.flag("is_transcoder", False)
    if gated and transcoder:
        raise config.refusal("is_transcoder", "the library has no gated transcoder")
    out, bias = (config.count("d_out"), "b_dec_out") if transcoder else (width, "b_dec")
    skip = transcoder and config.flag("transcoder_with_skip_connection", False)
    wanted = {"W_enc": [width, features], "W_dec": [features, out], "b_dec": [width], bias: [out]}
    wanted |= {name: [features] for name in (("b_gate", "b_mag", "r_mag") if gated else ("b_enc",))}
    wanted |= {"W_skip": [out, width]} if skip else {}
    check_tensors(tensors, wanted, path, needed_by=f"a {activation} of Prisma", source=CONFIG_FILE)
    norm = config.text("normalize_activations") if "normalize_activations" in config.values else "layer_norm"
    if norm not in _NORMS:
        raise config.refusal("normalize_activations", f"known are {', '.join(_NORMS)}")
    site, notes = lens_site(
        _hook(config, "hook_point_layer", "layer_subtype"), _out_hook(config) if transcoder else None
    )
    if transcoder:
        notes += (
            "b_dec is subtracted from the input, and b_dec_out added to the output: folded into the encoder bias",
        )
    for key, what in (("cls_token_only", "class token"), ("use_patches_only", "patches")):
        if config.flag(key, False):
            notes += (f"{key}: it was trained on the {what} alone, and positions are the request's to choose",)
    weights = Weights(
        enc=tensors["W_enc"].T,
        dec=tensors["W_dec"],
        dec_bias=tensors[bias],
        bias=tensors["b_gate" if gated else "b_enc"],
        subtracts_decoder_bias=not transcoder,
        r_mag=tensors["r_mag"] if gated else None,
        b_mag=tensors["b_mag"] if gated else None,
        input_bias=tensors["b_dec"] if transcoder else None,
    )
    return assemble(
        location.folder if location.file is None else path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture=(config.text("architecture") or "standard") + (" transcoder" if transcoder else ""),
        activation=activation,
        k=k,
        input_norm=_NORMS[norm],
        site=site,
        model_name=config.text("model_name"),
        skip=skip,
        notes=notes,
    )


FAMILY = Family(FAMILY_NAME, f"one .pt beside {CONFIG_FILE} with {', '.join(sorted(_KEYS))}", recognises, open_folder)


def _unwrapped(file: MappedFile) -> MappedFile:
    """The state that a file holds bare, or under a name."""
    inner = file.values.get("state_dict")
    return replace(file, values=inner) if isinstance(inner, Mapping) else file


def _features(config: Settings) -> int:
    return (
        config.count("d_sae")
        if config.values.get("d_sae") is not None
        else (config.count("d_in") * config.count("expansion_factor"))
    )


def _hook(config: Settings, layer_key: str, hook_key: str) -> str:
    layer = config.values.get(layer_key)
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise config.bad(layer_key, "a layer's number")
    return f"blocks.{layer}.{config.text(hook_key)}"


def _out_hook(config: Settings) -> str:
    return _hook(config, "out_hook_point_layer", "layer_out_subtype")


def _activation(config: Settings, features: int) -> tuple[Activation, int | None]:
    architecture, function = config.text("architecture") or "standard", config.text("activation_fn_str") or ""
    if architecture == "gated" and function == "relu":
        return Activation.GATED, None
    if architecture not in {"standard", "gated"}:
        raise config.refusal("architecture", "known are standard and gated")
    if architecture == "gated" or function not in _ACTIVATIONS:
        known = "relu" if architecture == "gated" else ", ".join(_ACTIVATIONS)
        raise config.refusal("activation_fn_str", f"with architecture {architecture!r} known is {known}")
    if function != "topk":
        return _ACTIVATIONS[function], None
    kwargs = Settings(config.table("activation_fn_kwargs"), config.path)
    if "postact_fn" in kwargs.values:
        raise kwargs.refusal("postact_fn", "known is the ReLU of a file that does not name one")
    k = kwargs.count("k")
    if k > features:
        raise kwargs.bad("k", f"at most the number of features, {features}")
    return Activation.TOPK, k
