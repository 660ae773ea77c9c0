"""Transcoders of one layer in the layout of circuit-tracer (mwhanna's of Qwen3): ``layer_<n>.safetensors``.

Layout: ``W_enc [F, D]``, ``W_dec [F, D_out]``, ``b_enc [F]``, ``b_dec [D_out]``; JumpReLU with
``activation_function.threshold [F]``, TopK with ``k``, else ReLU; ``W_skip [D_out, D]`` besides. Nothing is subtracted
from the input. Where they read and write is in ``config.yaml`` (``feature_input_hook``, ``feature_output_hook``).
Source: safety-research/circuit-tracer, ``single_layer_transcoder.py``.
"""

import re
from pathlib import Path

import yaml
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import MAX_CONFIG_BYTES, FileSae
from sae_steer.sae.lens_hooks import lens_site
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Site

FAMILY_NAME = "layer_transcoders"
CONFIG_FILE = "config.yaml"
_LAYOUT = {"b_enc": "F", "b_dec": "D_out", "W_dec": "F D_out", "W_enc": "F D"}
_THRESHOLD, _K, _SKIP = "activation_function.threshold", "k", "W_skip"
_SUFFIX = ".safetensors"
_FILE = re.compile(r"layer_(?P<layer>\d{1,5})\.safetensors")


def recognises(location: Location) -> bool:
    """Whether a place has one file of that name, with these tensors."""
    path = location.only(_SUFFIX)
    return path is not None and _FILE.fullmatch(path.name) is not None and location.peek(path).keys() >= _LAYOUT.keys()


def open_file(location: Location) -> FileSae:
    """Opens such a file; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.only(_SUFFIX)
    layer = _FILE.fullmatch(path.name) if path is not None else None
    if path is None or layer is None:
        raise CheckpointError(f"{location.path}: needed is one file layer_<n>{_SUFFIX}. Name the file.")
    file = location.open(path)
    tensors = file.tensors
    more = {_THRESHOLD: "F", _SKIP: "D_out D"}
    layout = _LAYOUT | {name: letters for name, letters in more.items() if name in tensors}
    sizes = fit_shapes(tensors, layout, path, needed_by=FAMILY_NAME)
    theta = tensors.get(_THRESHOLD)
    if theta is not None and bool((theta < 0).any()):
        raise UnsupportedCheckpoint(
            f"{path}: {_THRESHOLD} is below 0 for some features, which is refused: circuit-tracer then keeps negative "
            "activations, and a JumpReLU here is never negative."
        )
    k = _k(tensors, sizes["F"], path)
    if theta is not None and k is not None:
        raise CheckpointError(f"{path} holds both {_THRESHOLD} and {_K}; remove the one that is not meant.")
    activation = Activation.TOPK if k is not None else Activation.RELU if theta is None else Activation.JUMPRELU
    site, model, notes = _site(path.parent / CONFIG_FILE, int(layer["layer"]))
    weights = Weights(
        enc=tensors["W_enc"],
        dec=tensors["W_dec"],
        dec_bias=tensors["b_dec"],
        bias=tensors["b_enc"],
        subtracts_decoder_bias=False,
        theta=theta,
    )
    skip = _SKIP in tensors
    return assemble(
        path,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture=f"{activation} transcoder" + (" with skip connection" if skip else ""),
        activation=activation,
        k=k,
        site=site,
        model_name=model,
        skip=skip,
        notes=notes,
    )


FAMILY = Family(FAMILY_NAME, f"one layer_<n>{_SUFFIX} with {', '.join(_LAYOUT)}", recognises, open_file)


def _k(tensors: dict[str, Tensor], features: int, path: Path) -> int | None:
    k = tensors.get(_K)
    if k is None:
        return None
    if k.numel() != 1 or k.is_floating_point() or not 1 <= int(k) <= features:
        raise CheckpointError(f"{path}: {_K} is {k.tolist()}; needed is a whole number from 1 to {features}.")
    return int(k)


def _site(path: Path, layer: int) -> tuple[Site | None, str | None, tuple[str, ...]]:
    """Site, model and notes by the configuration, where it is there."""
    if not path.is_file():
        return None, None, (f"{CONFIG_FILE} is missing, which says where it reads and writes: name its site",)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, the most that is read.")
        values = yaml.safe_load(content)
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; needed are settings by name.")
    config = Settings(values, path)
    hooks = [config.text(key) for key in ("feature_input_hook", "feature_output_hook")]
    if None in hooks:
        return (
            None,
            config.text("model_name"),
            (f"{CONFIG_FILE} does not say where it reads and writes: name its site",),
        )
    site, notes = lens_site(*(f"blocks.{layer}.{hook}" for hook in hooks))
    return site, config.text("model_name"), notes
