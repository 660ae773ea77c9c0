"""``sae-steer inspect``: what a checkpoint is, as this program understands it."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sae_steer_cli.refusal import refusals

if TYPE_CHECKING:
    from torch import Tensor

    from sae_steer.sae import Sae

INSPECT_HELP = """
Say what the SAE at PATH is: its family, its forward pass, where it belongs, its numbers, and what to know about it.

**Examples**

    sae-steer inspect ./sae-layer-12
    sae-steer inspect ./layer_12/params.npz
    sae-steer inspect org/repo/layer_12@main --json

Check that a converted dictionary is whole, which reads all of it:

    sae-steer inspect ./layer-12 --check
"""
SAMPLE = 256

_FORMULAS = {
    "identity": "f = pre",
    "relu": "f = max(pre, 0)",
    "tanh_relu": "f = tanh(max(pre, 0))",
    "jumprelu": "f = max(pre, 0) where pre > theta, else 0",
    "gated": "f = max(mag_scale <w, N(x)> + mag_bias, 0) where pre > 0, else 0",
    "topk": "f = max(pre, 0) where pre is among the k largest, else 0",
}
_NORMS = {
    "none": "x as it is",
    "center": "x - mean(x)",
    "layer_norm": "(x - mean(x)) / (std(x) + 1e-5), with the unbiased std",
    "norm_rescale": "x sqrt(D) / |x|",
}
_UNITS = {
    "raw": "as the file's own encoder gives them",
    "decoder_norm": "the file's own, times the norm of the feature's decoder row",
}


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, a file, or org/repo[/folder][@revision].")],
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="The checkpoint family, where the files do not tell it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read all of a canonical file and hold it against its digest.")
    ] = False,
) -> None:
    """See ``INSPECT_HELP``."""
    with refusals():
        # Not before: torch takes a second, which --help need not wait for.
        from sae_steer.sae import canonical, open_sae

        sae = open_sae(path, family)
        if check:
            canonical.check(sae)
        found = facts(sae)
        typer.echo(json.dumps(found, indent=2) if as_json else _as_text(found))


def facts(sae: "Sae") -> dict[str, object]:
    """What is known of an SAE, for people and programs; ``sample`` is of at most ``SAMPLE`` features, evenly spread."""
    from sae_steer.sae import Labels

    spec = sae.spec
    labels = Labels.load(sae.path, spec.n_features)
    sample, broken = _sample(sae)
    warnings = list(spec.notes) + broken
    if spec.site is None and not any("site" in note for note in spec.notes):
        warnings.append("the files do not say where it belongs: name its site when serving it")
    if spec.activation == "topk":
        warnings.append("ranks need the whole dictionary in memory: serve it with --whole")
    return {
        "path": str(sae.path),
        "family": spec.family,
        "architecture": spec.architecture,
        "activation": spec.activation.value,
        "formula": _FORMULAS.get(spec.activation, spec.activation),
        "features": spec.n_features,
        "d_in": spec.d_in,
        "d_out": spec.d_out,
        "k": spec.k,
        "input_norm": spec.input_norm.value,
        "subtracts_decoder_bias": spec.subtracts_decoder_bias,
        "site": None if spec.site is None else str(spec.site),
        "model": spec.model_name,
        "dtype": spec.dtype,
        "value_convention": spec.value_convention,
        "labels": len(labels),
        "fingerprint": sae.fingerprint,
        "sample": sample,
        "notes": warnings,
    }


def _sample(sae: "Sae") -> tuple[dict[str, list[float]], list[str]]:
    """Least, middle and largest of some numbers, and what could not be read."""
    from sae_steer.errors import CheckpointError

    count = sae.spec.n_features
    ids = sorted({i * count // SAMPLE for i in range(SAMPLE)}) if count > SAMPLE else list(range(count))
    try:
        rows = sae.rows(ids)
        numbers = {
            "encoder row norm": _spread(rows.enc.double().norm(dim=1)),
            "decoder row norm": _spread(rows.dec.double().norm(dim=1)),
            "bias": _spread(rows.bias.double()),
        }
        if sae.spec.activation == "jumprelu":
            numbers["threshold"] = _spread(rows.theta.double())
        return numbers | {"decoder bias norm": [float(sae.decoder_bias().double().norm())]}, []
    except CheckpointError as error:
        return {}, [error.message]


def _spread(values: "Tensor") -> list[float]:
    return [float(values.min()), float(values.median()), float(values.max())]


def _as_text(found: dict[str, object]) -> str:
    subtracts = "<w, N(x) - b_dec> + b" if found["subtracts_decoder_bias"] else "<w, N(x)> + b"
    lines = {
        "path": found["path"],
        "family": f"{found['family']} ({found['architecture']})",
        "forward": f"pre = {subtracts}; {found['formula']}",
        "N(x)": _NORMS.get(str(found["input_norm"]), found["input_norm"]),
        "k": found["k"],
        "features": found["features"],
        "width": found["d_in"] if found["d_in"] == found["d_out"] else f"{found['d_in']} in, {found['d_out']} out",
        "site": found["site"] or "not said",
        "model": found["model"] or "not said",
        "stored as": found["dtype"],
        "values": _UNITS.get(str(found["value_convention"]), found["value_convention"]),
        "labels": found["labels"],
        "fingerprint": found["fingerprint"],
    }
    width = max(map(len, lines)) + 2
    text = [f"{key:<{width}}{value}" for key, value in lines.items() if value is not None]
    sample = found["sample"]
    assert isinstance(sample, dict)
    for name, values in sample.items():
        spread = "  ".join(f"{value:.6g}" for value in values)
        text.append(f"{name}: {spread}" + ("  (least, middle, largest of a sample)" if len(values) == 3 else ""))
    notes = found["notes"]
    assert isinstance(notes, list)
    return "\n".join([*text, *(f"note: {note}" for note in notes)])
