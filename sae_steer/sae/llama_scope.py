"""Llama Scope, the release of 2024: ``hyperparams.json`` beside ``checkpoints/final.safetensors``.

Layout: ``encoder.weight [F, D]``, ``encoder.bias [F]``, ``decoder.weight [D, F]``, ``decoder.bias [D]``. What is
computed is what its authors' loader makes of the file for inference (OpenMOSS/Language-Model-SAEs, October 2024): first
the dataset's average norms are folded, ``c = sqrt(D) / norm``,

    b_enc / c_in,    W_dec c_in / c_out,    b_dec / c_out

and then, with ``sparsity_include_decoder_norm``, every feature is taken in units of its decoder row's norm; the one
threshold holds in the units that result.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from sae_steer.errors import CheckpointError
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae, read_json
from sae_steer.sae.lens_hooks import lens_site
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import check_tensors
from sae_steer.sae.weights import Weights

FAMILY_NAME = "llama_scope"
CONFIG_FILE = "hyperparams.json"
FOLDER, WEIGHTS_FILE = "checkpoints", "final.safetensors"


def recognises(location: Location) -> bool:
    """Whether there is a configuration with its weights below it; the weights may be what was named."""
    return _root(location) is not None


def open_folder(location: Location) -> FileSae:
    """Opens such a folder; raises :class:`CheckpointError` or one of its subclasses."""
    root = _root(location)
    if root is None:
        raise CheckpointError(f"{location.path} lacks {CONFIG_FILE} or {FOLDER}/{WEIGHTS_FILE}.")
    config = Settings(read_json(root / CONFIG_FILE), root / CONFIG_FILE)
    path = root / FOLDER / WEIGHTS_FILE
    file = location.open(path)
    tensors = file.tensors
    width = config.count("d_model")
    features = config.count("d_sae")
    biased = config.flag("use_decoder_bias", True)
    wanted = {"encoder.weight": [features, width], "encoder.bias": [features], "decoder.weight": [width, features]}
    wanted |= {"decoder.bias": [width]} if biased else {}
    check_tensors(tensors, wanted, path, needed_by="Llama Scope", source=CONFIG_FILE)

    for key in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if config.flag(key, False):
            raise config.refusal(key, "no release of this family has it, so what it computes is not known for certain")
    activation, k, theta, notes = _activation(config, features)
    scale_in, scale_out, more = _scales(config, width)
    notes += more
    units = config.flag("sparsity_include_decoder_norm", True)
    if units:
        notes += ("activations are in units of decoder norms, as the authors' loader gives them: folded into the rows",)
    site, more = lens_site(config.text("hook_point_in"), config.text("hook_point_out"))
    weights = Weights(
        enc=tensors["encoder.weight"],
        dec=tensors["decoder.weight"].T,
        dec_bias=tensors["decoder.bias"].double() / scale_out if biased else torch.zeros(width),
        bias=tensors["encoder.bias"].double() / scale_in,
        subtracts_decoder_bias=False,
        theta=theta,
        decoder_norm_units=units,
        dec_scale=scale_in / scale_out,
    )
    return assemble(
        root,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture=config.text("act_fn") or "",
        activation=activation,
        site=site,
        k=k,
        model_name=config.text("model_name"),
        notes=notes + more,
        parameters=(scale_in, scale_out, float(theta[0]) if theta is not None else 0.0),
    )


FAMILY = Family(FAMILY_NAME, f"{CONFIG_FILE} and {FOLDER}/{WEIGHTS_FILE}", recognises, open_folder)


def _root(location: Location) -> Path | None:
    """The folder of the configuration."""
    if location.file is None:
        root = location.folder
    elif location.file.name == WEIGHTS_FILE and location.folder.name == FOLDER:
        root = location.folder.parent
    else:
        return None
    there = (root / CONFIG_FILE).is_file() and (root / FOLDER / WEIGHTS_FILE).is_file()
    return root if there else None


def _activation(config: Settings, features: int) -> tuple[Activation, int | None, Tensor | None, tuple[str, ...]]:
    """The activation, its k, its threshold and what to know about them."""
    name = config.text("act_fn")
    threshold = config.number("jump_relu_threshold") if config.values.get("jump_relu_threshold") is not None else 0.0
    if name == "relu":
        return Activation.RELU, None, None, ()
    if name == "topk" and threshold <= 0:
        k = config.count("top_k")
        if k > features:
            raise config.bad("top_k", f"at most d_sae, {features}")
        return Activation.TOPK, k, None, ()
    if name not in {"jumprelu", "topk"}:
        raise config.refusal("act_fn", "known are jumprelu, topk and relu")
    if name == "jumprelu":
        threshold = config.number("jump_relu_threshold")
    if threshold < 0:
        raise config.refusal("jump_relu_threshold", "below 0 its authors' code keeps negative activations")
    note = (f"topk with a threshold is taken for jumprelu at {threshold}, as the authors' loader does",)
    return Activation.JUMPRELU, None, torch.full((features,), threshold).double(), note if name == "topk" else ()


def _scales(config: Settings, width: int) -> tuple[float, float, tuple[str, ...]]:
    """``c_in``, ``c_out`` and what to know about them."""
    match config.text("norm_activation"):
        case "inference":
            return 1.0, 1.0, ("norm_activation is inference: its scaling is in the weights already",)
        case "dataset-wise":
            norms = Settings(config.table("dataset_average_activation_norm"), config.path)
            for key in ("in", "out"):
                if norms.number(key) <= 0:
                    raise norms.bad(key, "a positive number")
            scales = [math.sqrt(width) / norms.number(key) for key in ("in", "out")]
            note = (
                f"dataset-wise norm folded, c = {scales[0]:.6g}: values are in units of the model's activations; "
                "sae-lens and Neuronpedia give them times c",
            )
            return scales[0], scales[1], note
    raise config.refusal("norm_activation", "known are dataset-wise and inference")
