"""SAELens checkpoints: ``cfg.json`` beside ``sae_weights.safetensors``, as written by sae-lens 2 to 6.

Layout: ``W_enc [D, F]``, ``W_dec [F, D_out]``, ``b_dec [D_out]``; ``b_enc [F]`` (gated instead: ``b_gate``, ``b_mag``,
``r_mag``); JumpReLU also ``threshold [F]``, in training files ``log_threshold``. Source: sae-lens 6.54.12, ``saes/``.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint
from sae_steer.sae.files import FileSae, read_json
from sae_steer.sae.location import Location
from sae_steer.sae.record import DECODER_NORM_UNITS, Activation, SaeSpec
from sae_steer.sae.registry import Family
from sae_steer.sae.saelens_config import FAMILY_NAME, SCALED, parse_config
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import DTYPES, check_tensors
from sae_steer.sae.weights import Weights

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"


def recognises(location: Location) -> bool:
    """Whether a folder holds both files."""
    return location.has(CONFIG_FILE, WEIGHTS_FILE)


def open_folder(location: Location) -> FileSae:
    """Opens a SAELens folder; raises :class:`CheckpointError` or one of its subclasses."""
    folder = location.folder
    config = read_json(folder / CONFIG_FILE)
    scale = _scale(folder) if config.get("normalize_activations") == SCALED else None
    spec = parse_config(config, folder / CONFIG_FILE, scaled=scale is not None)
    path = folder / WEIGHTS_FILE
    file = location.open(path)
    tensors = file.tensors
    _check_shapes(tensors, spec, path)
    theta, notes = _threshold(tensors, spec, path)
    notes += _check_scaling_factor(tensors, path)
    if scale is not None:
        notes += (f"the input is scaled by {scale:.6g}, as {SCALER_FILE} says: folded into encoder and decoder",)
    dtype = DTYPES[tensors["W_enc"].dtype]
    if dtype != spec.dtype:
        notes += (f"cfg.json says {spec.dtype}, and the encoder is stored as {dtype}: its stored values are used",)
    spec = replace(spec, dtype=dtype, notes=spec.notes + notes)
    gated = spec.activation is Activation.GATED
    weights = Weights(
        enc=tensors["W_enc"].T,
        dec=tensors["W_dec"],
        dec_bias=tensors["b_dec"] if scale is None else tensors["b_dec"].double() / scale,
        bias=tensors["b_gate" if gated else "b_enc"],
        subtracts_decoder_bias=spec.subtracts_decoder_bias,
        theta=theta,
        r_mag=tensors["r_mag"] if gated else None,
        b_mag=tensors["b_mag"] if gated else None,
        decoder_norm_units=spec.value_convention == DECODER_NORM_UNITS,
        enc_scale=scale or 1.0,
        dec_scale=1 / (scale or 1.0),
    )
    return FileSae(spec, folder, weights, (file,), parameters=(scale,) if scale is not None else ())


FAMILY = Family(FAMILY_NAME, f"{CONFIG_FILE} and {WEIGHTS_FILE}", recognises, open_folder)


def _check_shapes(tensors: Mapping[str, Tensor], spec: SaeSpec, path: Path) -> None:
    """Refuses missing tensors, shapes that are not those of the configuration, and types that are not floats."""
    features = [spec.n_features]
    wanted = {
        "W_enc": [spec.d_in, spec.n_features],
        "W_dec": [spec.n_features, spec.d_out],
        "b_dec": [spec.d_out],
    }
    match spec.activation:
        case Activation.GATED:
            wanted |= {"b_gate": features, "b_mag": features, "r_mag": features}
        case _:
            wanted |= {"b_enc": features}
    wanted |= {name: features for name in ("threshold", "log_threshold") if name in tensors}
    check_tensors(tensors, wanted, path, needed_by=repr(spec.architecture), source=CONFIG_FILE)


def _threshold(tensors: Mapping[str, Tensor], spec: SaeSpec, path: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    if spec.activation is not Activation.JUMPRELU:
        return None, ()
    match "threshold" in tensors, "log_threshold" in tensors:
        case True, False:
            return tensors["threshold"], ()
        case False, True:
            return tensors["log_threshold"].double().exp(), ("threshold = exp(log_threshold)",)
        case True, True:
            raise CheckpointError(f"{path} holds both threshold and log_threshold; remove the one that is not meant.")
        case _:
            raise CheckpointError(f"{path} lacks threshold, which {spec.architecture!r} needs.")


def _scale(folder: Path) -> float | None:
    """The factor by which the input is scaled, which sae-lens writes beside what it saves while training."""
    if not (folder / SCALER_FILE).is_file():
        return None
    scaler = Settings(read_json(folder / SCALER_FILE), folder / SCALER_FILE)
    if scaler.values.get("scaling_factor") is None:
        return None
    if scaler.number("scaling_factor") <= 0:
        raise scaler.bad("scaling_factor", "a positive number")
    return scaler.number("scaling_factor")


def _check_scaling_factor(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Old files carry a per-feature factor for fine-tuning, which sae-lens 6 itself no longer applies."""
    if "scaling_factor" not in tensors:
        return ()
    if not bool((tensors["scaling_factor"] == 1).all()):
        raise UnsupportedCheckpoint(
            f"{path}: scaling_factor is not 1 everywhere, and sae-lens versions differ in what they do with it. "
            "Multiply W_dec by it where the SAE was fine-tuned that way, and save without it."
        )
    return ("scaling_factor is 1 everywhere and left out",)
