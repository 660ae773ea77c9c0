"""dictionary_learning: ``ae.pt``, a state dict, beside ``config.json``, whose ``trainer.dict_class`` names the class.

Checkpoints in ``checkpoints/ae_STEP.pt`` have their configuration one folder up. Biases and thresholds in saved files
are in units of the model's activations already; in the backup of an interrupted run, which has its state dict under
``ae``, they are not, and it is refused. Source: saprmarks/dictionary_learning, ``dictionary.py`` and ``trainers/``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae, MappedFile, read_json
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "dictionary_learning"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"
_RESIDUAL = re.compile(r"resid_post_layer_(?P<layer>\d{1,5})")
_LINEAR = {"encoder.bias": "F", "encoder.weight": "F D", "decoder.weight": "D F"}
_MATRIX = {"b_enc": "F", "b_dec": "D", "W_enc": "D F", "W_dec": "F D"}


@dataclass(frozen=True, slots=True)
class _Class:
    """A class of the library: its tensors with their shapes, its activation, and whether it subtracts its bias."""

    layout: Mapping[str, str]
    activation: Activation
    subtracts: bool
    dec_bias: str = "b_dec"
    enc_bias: str = "encoder.bias"


_TOPK = _LINEAR | {"b_dec": "D", "threshold": ""}
_MATRYOSHKA = _Class(_MATRIX | {"threshold": ""}, Activation.JUMPRELU, True, enc_bias="b_enc")
_CLASSES = {
    "AutoEncoder": _Class(_LINEAR | {"bias": "D"}, Activation.RELU, True, dec_bias="bias"),
    "AutoEncoderNew": _Class(_LINEAR | {"decoder.bias": "D"}, Activation.RELU, False, dec_bias="decoder.bias"),
    "GatedAutoEncoder": _Class(
        {
            "gate_bias": "F",
            "mag_bias": "F",
            "r_mag": "F",
            "decoder_bias": "D",
            "encoder.weight": "F D",
            "decoder.weight": "D F",
        },
        Activation.GATED,
        True,
        dec_bias="decoder_bias",
        enc_bias="gate_bias",
    ),
    "JumpReluAutoEncoder": _Class(_MATRIX | {"threshold": "F"}, Activation.JUMPRELU, False, enc_bias="b_enc"),
    "AutoEncoderTopK": _Class(_LINEAR | {"b_dec": "D"}, Activation.TOPK, True),
    "BatchTopKSAE": _Class(_TOPK, Activation.JUMPRELU, True),
    "MatryoshkaBatchTopKSAE": _MATRYOSHKA,
    # Spelt so in the copy of the library that sae-for-vlm trains with.
    "MatroyshkaBatchTopKSAE": _MATRYOSHKA,
}
# Classes whose tensors no other class, and no other family, has: told without a configuration.
_TOLD_BY_NAMES = {
    frozenset({"bias", "encoder.weight", "encoder.bias", "decoder.weight"}): "AutoEncoder",
    frozenset(_CLASSES["GatedAutoEncoder"].layout): "GatedAutoEncoder",
    frozenset({*_MATRIX, "k", "threshold", "group_sizes"}): "MatryoshkaBatchTopKSAE",
}
# AutoEncoderTopK and BatchTopKSAE: of this family, but not told apart.
_AMBIGUOUS = frozenset({*_TOPK, "k"})


def recognises(location: Location) -> bool:
    """Whether a place has one ``.pt`` file, and a configuration that names a class or tensors of this family alone."""
    path = _weights(location)
    if path is None:
        return False
    try:
        if _trainer(path).values.get("dict_class") is not None:
            return True
    except CheckpointError as error:
        location.problems.append(error)
    names = frozenset(location.peek(path))
    return names in _TOLD_BY_NAMES or names == _AMBIGUOUS


def open_trainer(location: Location) -> FileSae:
    """Opens one trainer's dictionary; raises :class:`CheckpointError` or one of its subclasses."""
    path = _weights(location)
    if path is None:
        raise CheckpointError(f"{location.path}: needed is {WEIGHTS_FILE}, or one .pt file. Name the file.")
    file = location.open(path)
    trainer = _trainer(path)
    name = _class_name(file, trainer)
    kind, tensors = _CLASSES[name], file.tensors
    known = {
        letter: trainer.count(key)
        for letter, key in (("F", "dict_size"), ("D", "activation_dim"))
        if key in trainer.values
    }
    sizes = fit_shapes(tensors, kind.layout, path, needed_by=name, known=known, source=CONFIG_FILE)
    k = _k(tensors, trainer, sizes["F"]) if kind.activation is Activation.TOPK else None
    theta = tensors.get("threshold")
    site, notes = _site(trainer)
    return assemble(
        location.folder if path.name == WEIGHTS_FILE else path,
        (file,),
        _views(kind, tensors, sizes["F"]),
        family=FAMILY_NAME,
        architecture=name,
        activation=kind.activation,
        site=site,
        k=k,
        model_name=trainer.text("lm_name"),
        notes=notes + _notes(name, theta),
        topk_threshold=_trained(theta) if kind.activation is Activation.TOPK else None,
    )


FAMILY = Family(
    FAMILY_NAME,
    f"one .pt file and a {CONFIG_FILE} with trainer.dict_class beside it or one folder up",
    recognises,
    open_trainer,
)


def _weights(location: Location) -> Path | None:
    """The file that a run ends with, or the only one."""
    return location.folder / WEIGHTS_FILE if location.has(WEIGHTS_FILE) else location.only(".pt")


def _trainer(path: Path) -> Settings:
    """The trainer's settings, beside a file or one folder up from ``checkpoints``; empty where there are none."""
    file = (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / CONFIG_FILE
    if not file.is_file():
        return Settings({}, path)
    return Settings(Settings(read_json(file), file).table("trainer"), file)


def _class_name(file: MappedFile, trainer: Settings) -> str:
    """The class that a file is of; raises :class:`UnsupportedCheckpoint` where it is not told, or not known."""
    if "ae" in file.values:
        raise UnsupportedCheckpoint(
            f"{file.path} is the backup of an interrupted run (it holds 'ae'), whose biases are not in units of the "
            "model's activations. Let the run finish, or load and save it with dictionary_learning, its biases scaled."
        )
    name = trainer.text("dict_class") or _TOLD_BY_NAMES.get(frozenset(file.values))
    if name is None:
        raise UnsupportedCheckpoint(
            f"{file.path}: there is no {CONFIG_FILE} with trainer.dict_class beside it or one folder up, and its "
            f"tensors do not tell its class: {', '.join(sorted(file.values))}."
        )
    if name not in _CLASSES:
        raise trainer.refusal("dict_class", f"known are {', '.join(_CLASSES)}")
    return name


def _views(kind: _Class, tensors: Mapping[str, Tensor], features: int) -> Weights:
    matrices, gated = "W_enc" in kind.layout, kind.activation is Activation.GATED
    return Weights(
        enc=tensors["W_enc"].T if matrices else tensors["encoder.weight"],
        dec=tensors["W_dec"] if matrices else tensors["decoder.weight"].T,
        dec_bias=tensors[kind.dec_bias],
        bias=tensors[kind.enc_bias],
        subtracts_decoder_bias=kind.subtracts,
        theta=tensors["threshold"].expand(features) if kind.activation is Activation.JUMPRELU else None,
        r_mag=tensors["r_mag"] if gated else None,
        b_mag=tensors["mag_bias"] if gated else None,
    )


def _k(tensors: Mapping[str, Tensor], trainer: Settings, features: int) -> int:
    said = trainer.count("k") if "k" in trainer.values or "k" not in tensors else None
    stored = int(tensors["k"]) if "k" in tensors and tensors["k"].numel() == 1 else None
    k = stored if stored is not None else said
    if k is None or (said is not None and k != said) or not 1 <= k <= features:
        raise CheckpointError(
            f"{trainer.path}: k is {said!r}, and the weights say {stored!r}; needed is one number from 1 to {features}."
        )
    return k


def _site(trainer: Settings) -> tuple[Site | None, tuple[str, ...]]:
    """The residual stream where ``submodule_name`` says it in the library's words; otherwise the user names it."""
    submodule = trainer.text("submodule_name")
    match = _RESIDUAL.fullmatch(submodule or "")
    if match is not None and trainer.values.get("layer", int(match["layer"])) == int(match["layer"]):
        place = Place(Kind.RESID_POST, int(match["layer"]))
        return Site(place, place), ()
    layer = trainer.values.get("layer")
    return None, (
        f"it was trained on submodule {submodule!r} of layer {layer!r}, which is no place this program knows: name its "
        "site",
    )


def _trained(theta: Tensor | None) -> Tensor | None:
    """A threshold that training has set: it starts at -1."""
    return theta if theta is not None and theta.numel() == 1 and float(theta) >= 0 else None


def _notes(name: str, theta: Tensor | None) -> tuple[str, ...]:
    match name:
        case "AutoEncoder":
            return (
                "values are the file's own: dictionary_learning's loader multiplies them by the norms of the decoder's "
                "rows, unless it is told not to",
            )
        case "AutoEncoderTopK" if _trained(theta) is not None:
            return (f"the file also stores a threshold, {float(theta or 0):g}, which is not used unless asked for",)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE" | "MatroyshkaBatchTopKSAE" if _trained(theta) is None:
            return ("its threshold was never trained: plain ReLU",)
    return ()
