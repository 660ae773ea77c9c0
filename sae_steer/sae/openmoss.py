"""The current layout of OpenMOSS (``llamascopium``, before that ``lm_saes``): ``config.json`` and ``sae_weights.*``.

Layout: ``W_E [D, F]``, ``b_E [F]``, ``W_D [F, D]``, ``b_D [D]`` and ``activation_function.log_jumprelu_threshold [F]``;
older files, such as Llama Scope R1 Distill, have ``encoder.weight [F, D]``, ``encoder.bias``, ``decoder.bias``,
``decoder.weight [D, F]`` and ``log_jumprelu_threshold``. A ``.pt`` has them under ``sae``. The forward of
``models/sae.py``::

    x_n = c_in x,   pre = <w, x_n> + b,   f = pre where |d| pre is let through by act_fn,   x^ = (sum f d + b_D) / c_out

where ``|d|`` counts with ``sparsity_include_decoder_norm`` only, and ``c`` is ``sqrt(D)`` over the average norm where
the norm is dataset-wise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae, MappedFile, read_json
from sae_steer.sae.lens_hooks import lens_site
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import check_tensors
from sae_steer.sae.weights import Weights

FAMILY_NAME = "openmoss"
CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("sae_weights.safetensors", "sae_weights.pt")
_DISTRIBUTED = "sae_weights.dcp"
_NORM = "dataset_average_activation_norm"
_TYPES = {
    "clt": "a cross-layer transcoder writes at many layers, and a site here is one",
    "crosscoder": "a crosscoder reads several layers at once",
    "lorsa": "its features are attention heads, which depend on other positions",
    "molt": "its features are transforms of the input, which have no decoder row",
}
_ACTIVATIONS = {"relu": Activation.RELU, "jumprelu": Activation.JUMPRELU, "topk": Activation.TOPK}


@dataclass(frozen=True, slots=True)
class _Names:
    """The tensors' names, and whether matrices are those of a linear layer (outputs first)."""

    enc: str
    bias: str
    dec: str
    dec_bias: str
    log_threshold: str
    linear: bool


_NEW = _Names("W_E", "b_E", "W_D", "b_D", "activation_function.log_jumprelu_threshold", False)
_OLD = _Names("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "log_jumprelu_threshold", True)


def recognises(location: Location) -> bool:
    """Whether there is a configuration of this family beside weights under its names."""
    known = {"act_fn", "norm_activation"} <= location.config(CONFIG_FILE).keys()
    there = any(location.has(name) for name in WEIGHTS_FILES) or (location.folder / _DISTRIBUTED).is_dir()
    return known and there


def open_folder(location: Location) -> FileSae:
    """Opens such a folder; raises :class:`CheckpointError` or one of its subclasses."""
    config = Settings(read_json(location.folder / CONFIG_FILE), location.folder / CONFIG_FILE)
    kind = config.text("sae_type") or "sae"
    if kind != "sae":
        raise config.refusal("sae_type", _TYPES.get(kind, "known is sae"))
    file = _weights(location)
    tensors = file.tensors
    if config.flag("use_glu_encoder", False) or "W_E_glu" in tensors:
        raise UnsupportedCheckpoint(
            f"{file.path}: a GLU encoder (W_E_glu) has two rows for a feature, which no op here computes."
        )
    names = _NEW if _NEW.enc in tensors else _OLD
    width, features = config.count("d_model"), _features(config)
    biased = config.flag("use_decoder_bias", True)
    activation = _activation(config)
    enc, dec = [width, features], [features, width]
    wanted = {names.enc: enc[::-1] if names.linear else enc, names.dec: dec[::-1] if names.linear else dec}
    wanted |= {names.bias: [features]} | ({names.dec_bias: [width]} if biased else {})
    wanted |= {names.log_threshold: [features]} if activation is Activation.JUMPRELU else {}
    check_tensors(tensors, wanted, file.path, needed_by=config.text("act_fn") or "", source=CONFIG_FILE)

    of_norms = config.flag("sparsity_include_decoder_norm", True)
    scale_in, scale_out, notes = _scales(config, tensors, file, width)
    # A threshold needs the norms for its gate alone; ranks need them in the values too.
    ranked_by_norm = of_norms and activation is Activation.TOPK
    theta = None
    if activation is Activation.JUMPRELU:
        theta = tensors[names.log_threshold].double().exp()
        notes += ("threshold = exp(log_jumprelu_threshold)",)
        if of_norms:
            theta = theta / scale_out
            notes += ("the threshold holds for activations times decoder norms: divided by them",)
    if ranked_by_norm:
        notes += ("activations are in units of decoder norms, in which this TopK ranks: folded into the rows",)
    k = config.count("top_k") if activation is Activation.TOPK else None
    if k is not None and k > features:
        raise config.bad("top_k", f"at most the number of features, {features}")
    site, more = lens_site(config.text("hook_point_in"), config.text("hook_point_out"))
    weights = Weights(
        enc=tensors[names.enc] if names.linear else tensors[names.enc].T,
        dec=tensors[names.dec].T if names.linear else tensors[names.dec],
        dec_bias=tensors[names.dec_bias].double() / scale_out if biased else torch.zeros(width),
        bias=tensors[names.bias],
        subtracts_decoder_bias=False,
        theta=theta,
        decoder_norm_units=ranked_by_norm,
        enc_scale=scale_in,
        dec_scale=1 / scale_out,
        theta_of_scaled=of_norms and theta is not None,
    )
    return assemble(
        location.folder,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture=config.text("act_fn") or "",
        activation=activation,
        site=site,
        k=k,
        model_name=config.text("model_name"),
        notes=notes + more,
        parameters=(scale_in, scale_out, float(of_norms)),
    )


FAMILY = Family(
    FAMILY_NAME, f"{CONFIG_FILE} with act_fn and norm_activation, and {WEIGHTS_FILES[0]}", recognises, open_folder
)


def _weights(location: Location) -> MappedFile:
    name = next((name for name in WEIGHTS_FILES if location.has(name)), None)
    if name is None:
        if (location.folder / _DISTRIBUTED).is_dir():
            raise UnsupportedCheckpoint(
                f"{location.folder / _DISTRIBUTED} is a distributed checkpoint, which is not read here. Load it with "
                "llamascopium and save it with save_pretrained, in one process."
            )
        raise CheckpointError(f"{location.folder} holds none of {', '.join(WEIGHTS_FILES)}.")
    file = location.open(location.folder / name)
    inner = file.values.get("sae")
    if isinstance(inner, Mapping):
        return replace(file, values=inner)
    return file


def _features(config: Settings) -> int:
    if config.values.get("d_sae") is not None:
        return config.count("d_sae")
    return int(config.count("d_model") * config.number("expansion_factor"))


def _activation(config: Settings) -> Activation:
    name = (config.text("act_fn") or "").lower()
    if name == "batchtopk":
        raise config.refusal("act_fn", "it depends on the batch; convert it to jumprelu with llamascopium")
    if name not in _ACTIVATIONS:
        raise config.refusal("act_fn", f"known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _scales(
    config: Settings, tensors: Mapping[str, Tensor], file: MappedFile, width: int
) -> tuple[float, float, tuple[str, ...]]:
    """``c_in``, ``c_out`` and what to know about them. Without a dataset-wise norm the stored ones mean nothing."""
    match config.text("norm_activation"):
        case "inference":
            return 1.0, 1.0, ("norm_activation is inference: its scaling is in the weights already",)
        case "dataset-wise":
            scales = []
            for key in ("hook_point_in", "hook_point_out"):
                name = f"{_NORM}.{config.text(key)}"
                norm = tensors.get(name)
                if norm is None:
                    raise UnsupportedCheckpoint(
                        f"{file.path} lacks {name}, without which a dataset-wise norm cannot be folded. It holds "
                        f"{', '.join(sorted(tensors))}."
                    )
                if norm.numel() != 1 or not bool(norm.isfinite().all()) or not bool((norm > 0).all()):
                    raise CheckpointError(f"{file.path}: {name} is {norm.tolist()}; needed is one positive number.")
                scales.append(math.sqrt(width) / float(norm.double()))
            note = (
                f"dataset-wise norm folded, c = {scales[0]:.6g}: values are those of the normalised input, in which "
                "thresholds were trained; llamascopium gives them divided by c after fold_activation_scale",
            )
            return scales[0], scales[1], note
    raise config.refusal("norm_activation", "known are dataset-wise and inference")
