"""The definition of an edit: the design document's section 2, literally, token by token, in float64.

It reads what the user sent and the SAE's own file, and shares nothing with the compiler, the tables or the kernels, so
that it can be held against all of them. Slow, and meant to be read beside the text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.reference_app import Attenuation, written_out
from sae_steer.sae import Activation, InputNorm, Sae
from sae_steer.sae.record import DECODER_NORM_UNITS
from sae_steer.schema import (
    FeatureAblateEdit,
    FeatureMaskEdit,
    FeatureScaleEdit,
    FeatureValueEdit,
    Intervention,
    Positions,
    Ranges,
    Readings,
    Steering,
    VectorAblateEdit,
    VectorScaleEdit,
    VectorValueEdit,
)
from sae_steer.sites import Site

_FEATURES = FeatureValueEdit | FeatureScaleEdit | FeatureAblateEdit | FeatureMaskEdit | Attenuation


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a request: where it is, and what it is.

    Args:
        position: Absolute position ``p``.
        prompt_length: ``P``.
        token: Its id.
        bos: Id of the beginning-of-sequence token, if the model has one.
    """

    position: int
    prompt_length: int
    token: int
    bos: int | None = None


@dataclass(frozen=True, slots=True)
class Edited:
    """What became of one token at one site.

    Args:
        y: ``[D_out]`` float64, after the edit.
        dose: ``|delta| / |x|`` before the limit.
        over: Whether the limit was passed.
    """

    y: Tensor
    dose: float
    over: bool


_DICTIONARIES: dict[str, dict[str, Tensor]] = {}


def dictionary(sae: Sae) -> dict[str, Tensor]:
    """The unfolded dictionary of an SAE in float64, read once; in decoder-norm units where the file's values are."""
    if sae.fingerprint not in _DICTIONARIES:
        raw = dict(sae.dictionary())
        if sae.spec.value_convention == DECODER_NORM_UNITS:
            norms = raw["W_dec"].norm(dim=1)
            raw["W_enc"], raw["b_enc"] = raw["W_enc"] * norms, raw["b_enc"] * norms
            raw["W_dec"] = raw["W_dec"] / norms[:, None]
        _DICTIONARIES[sae.fingerprint] = raw
    return _DICTIONARIES[sae.fingerprint]


def normalised(sae: Sae, x: Tensor) -> tuple[Tensor, float, float]:
    """``N(x)``, and the scale and the offset that map a decoded vector back; ``x [D]`` float64."""
    norm = sae.spec.input_norm
    if norm is InputNorm.CENTER:
        return x - x.mean(), 1.0, float(x.mean())
    if norm is InputNorm.LAYER_NORM:
        std = x.std(unbiased=True)
        return (x - x.mean()) / (std + 1e-5), float(std), float(x.mean())
    if norm is InputNorm.NORM_RESCALE:
        scale = math.sqrt(x.numel()) / float(x.norm())
        return x * scale, 1 / scale, 0.0
    return x, 1.0, 0.0


def encode(sae: Sae, x: Tensor) -> Tensor:
    """All activations ``[F]`` of an SAE on one token ``x [D]``, from the tensors of its file, in float64."""
    raw = dictionary(sae)
    normal, _, _ = normalised(sae, x)
    if sae.spec.subtracts_decoder_bias:
        normal = normal - raw["b_dec"]
    dots = normal @ raw["W_enc"]
    if sae.spec.activation is Activation.GATED:
        magnitude = torch.relu(torch.exp(raw["r_mag"]) * dots + raw["b_mag"])
        return torch.where(dots + raw["b_gate"] > 0, magnitude, 0.0)
    pre = dots + raw["b_enc"]
    match sae.spec.activation:
        case Activation.RELU:
            return torch.relu(pre)
        case Activation.TANH_RELU:
            return torch.tanh(torch.relu(pre))
        case Activation.JUMPRELU:
            return torch.where(pre > raw["threshold"], torch.relu(pre), 0.0)
        case Activation.TOPK:
            assert sae.spec.k is not None  # the reader demands it
            larger = (pre[None, :] > pre[:, None]).sum(dim=1)
            return torch.where(larger < sae.spec.k, torch.relu(pre), 0.0)
    raise ValueError(f"no reference for {sae.spec.activation}")


def decode(sae: Sae, f: Tensor, x: Tensor) -> Tensor:
    """Decodes activations ``[F]`` to ``[D_out]``, mapped back through the normalisation of ``x``."""
    _, scale, offset = normalised(sae, x)
    return (f @ dictionary(sae)["W_dec"] + dictionary(sae)["b_dec"]) * scale + offset


def interventions(steering: Steering, catalog: Catalog) -> list[Intervention | Attenuation]:
    """The interventions of the profiles and of the request; with ``override``, the request's replace the profiles'.

    Those by a calibration are written out.
    """
    stored = [i for name in steering.profiles for i in catalog.profile(name).interventions]
    if not steering.override:
        return written_out([*stored, *steering.interventions], catalog)
    own = written_out(steering.interventions, catalog)
    mine = {target for i in own for target in _targets(i)}
    kept: list[Intervention | Attenuation] = []
    for intervention in written_out(stored, catalog):
        if isinstance(intervention, Attenuation):
            rest = [feature for feature in intervention.features if (intervention.sae, feature) not in mine]
            kept += [replace(intervention, features=rest)] if rest else []
            continue
        if isinstance(intervention, VectorValueEdit | VectorScaleEdit | VectorAblateEdit):
            kept += [intervention] if not mine & set(_targets(intervention)) else []
            continue
        values = getattr(intervention, "value", None)
        for n, feature in enumerate(intervention.features):  # type: ignore[union-attr]  # the others are written out
            if (intervention.sae, feature) not in mine:
                value = {"value": values[n] if isinstance(values, list) else values} if values is not None else {}
                kept.append(intervention.model_copy(update={"features": [feature]} | value))
    return kept + own


def _targets(intervention: Intervention | Attenuation) -> Iterator[tuple[str, object]]:
    if isinstance(intervention, VectorValueEdit | VectorScaleEdit | VectorAblateEdit):
        yield intervention.vector, intervention.site
    else:
        for feature in intervention.features:  # type: ignore[union-attr]  # the others are written out
            yield intervention.sae, feature


def in_positions(positions: Positions, token: Token) -> bool:
    """Whether a token is at one of some positions."""
    if isinstance(positions, Ranges):
        return any(start <= token.position < end for start, end in positions.ranges)
    if positions == "prompt":
        return token.position < token.prompt_length - 1
    return positions == "all" or token.position >= token.prompt_length - 1


def at_position(intervention: Intervention | Attenuation, token: Token) -> bool:
    """Whether an intervention's positions, ``skip_bos`` and ``token_in`` hold on a token."""
    held = in_positions(intervention.positions, token)
    if intervention.skip_bos and token.token == token.bos:
        held = False
    when = intervention.when
    return held and not (when is not None and when.token_in is not None and token.token not in when.token_in)


def gate_holds(intervention: Intervention | Attenuation, x: Tensor, catalog: Catalog) -> bool:
    """Whether an intervention's feature gate holds on the token ``x [D]``."""
    when = intervention.when
    if when is None or when.sae is None or when.feature is None:
        return True
    f = float(encode(catalog.sae(when.sae).sae, x)[when.feature])
    return (when.above is None or f > when.above) and (when.below is None or f < when.below)


def new_value(intervention: Intervention | Attenuation, n: int, f: float, unit: float) -> float:
    """``f'`` of the n-th feature of an intervention; ``unit`` is what its value is a multiple of."""
    if isinstance(intervention, Attenuation):
        return intervention.new_value(intervention.features[n], f)
    value = getattr(intervention, "value", 0.0)
    value = value[n] if isinstance(value, list) else value
    match intervention.op:
        case "clamp":
            return value * unit
        case "add":
            return f + value * unit
        case "floor":
            return max(f, value * unit)
        case "cap":
            return min(f, value * unit)
        case "scale" | "gain":
            return f * value
        case "ablate":
            return 0.0
        case "mask_range":
            assert isinstance(intervention, FeatureMaskEdit)  # the schema ties them
            return 0.0 if intervention.lo <= f <= intervention.hi else f
    raise ValueError(f"no reference for {intervention.op}")


def edit_token(x: Tensor, y: Tensor, site: Site, token: Token, steering: Steering, catalog: Catalog) -> Edited:
    """Edits one token at one site.

    Args:
        x: ``[D]`` float64, what is read, before any edit at this site.
        y: ``[D_out]`` float64, what is written; ``x`` itself at a residual site.
        site: The site.
        token: The token.
        steering: What the user sent.
        catalog: What its names mean.
    """
    delta = torch.zeros_like(y)
    dropped: CatalogSae | None = None
    for intervention in interventions(steering, catalog):
        if not at_position(intervention, token):
            continue
        if isinstance(intervention, VectorValueEdit | VectorScaleEdit | VectorAblateEdit):
            if Site.parse(intervention.site) == site and gate_holds(intervention, x, catalog):
                delta = delta + _vector_delta(intervention, x, catalog)
            continue
        assert isinstance(intervention, _FEATURES)  # the others are written out
        entry = catalog.sae(intervention.sae)
        if entry.site != site:
            continue
        if steering.error == "drop":
            dropped = entry
        if gate_holds(intervention, x, catalog):
            delta = delta + _feature_delta(intervention, entry, x)
    if dropped is not None:
        delta = delta + decode(dropped.sae, encode(dropped.sae, x), x) - y
    size, length = float(delta.norm()), float(x.norm())
    dose = size / length if size else 0.0
    limit = steering.dose.limit if steering.dose is not None else math.inf
    over = dose > limit
    return Edited(y + (delta * (limit * length / size) if over else delta), dose, over)


def _feature_delta(
    intervention: FeatureValueEdit | FeatureScaleEdit | FeatureAblateEdit | FeatureMaskEdit | Attenuation,
    entry: CatalogSae,
    x: Tensor,
) -> Tensor:
    """``sum_i (f'_i - f_i) d_i`` of one intervention, mapped back through the SAE's normalisation."""
    f = encode(entry.sae, x)
    _, scale, _ = normalised(entry.sae, x)
    decoder = dictionary(entry.sae)["W_dec"]
    total = torch.zeros_like(decoder[0])
    for n, feature in enumerate(intervention.features):
        unit = _unit(intervention, entry, feature, x)
        old = float(f[feature])
        total = total + (new_value(intervention, n, old, unit) - old) * scale * decoder[feature]
    return total


def _unit(intervention: Intervention | Attenuation, entry: CatalogSae, feature: int, x: Tensor) -> float:
    """What the value of an edit of a feature is a multiple of."""
    if isinstance(intervention, FeatureValueEdit) and intervention.units == "reference_max":
        label = entry.labels.get(feature) if entry.labels is not None else None
        assert label is not None  # the compiler refuses such a request
        assert label.reference_max is not None
        return label.reference_max
    if isinstance(intervention, FeatureValueEdit) and intervention.units == "residual_norm":
        return float(x.norm())
    return 1.0


def _vector_delta(
    intervention: VectorValueEdit | VectorScaleEdit | VectorAblateEdit, x: Tensor, catalog: Catalog
) -> Tensor:
    """What a plain direction adds: the vector itself for ``add``, else along the unit direction."""
    vector = catalog.vector(intervention.vector).values.double()
    unit = (
        float(x.norm()) if isinstance(intervention, VectorValueEdit) and intervention.units == "residual_norm" else 1.0
    )
    if intervention.op == "add":
        return intervention.value * unit * vector
    direction: Tensor = vector / vector.norm()
    projection = float(direction @ x)
    return (new_value(intervention, 0, projection, unit) - projection) * direction


@dataclass(frozen=True, slots=True)
class Read:
    """What a reading has of one token.

    Args:
        values: Of the named features.
        top: The largest features above 0 with their values, the largest first, the lower number first among equals.
    """

    values: list[float]
    top: list[tuple[int, float]]


def activations_after(entry: CatalogSae, x: Tensor, token: Token, steering: Steering, catalog: Catalog) -> Tensor:
    """All activations ``[F]`` of an SAE on one token ``x [D]``, with the edited ones as they are edited to."""
    f = encode(entry.sae, x)
    after = f.clone()
    for intervention in interventions(steering, catalog):
        if isinstance(intervention, VectorValueEdit | VectorScaleEdit | VectorAblateEdit):
            continue
        assert isinstance(intervention, _FEATURES)  # the others are written out
        mine = catalog.sae(intervention.sae).sae.fingerprint == entry.sae.fingerprint
        if mine and at_position(intervention, token) and gate_holds(intervention, x, catalog):
            for n, feature in enumerate(intervention.features):
                unit = _unit(intervention, entry, feature, x)
                after[feature] = new_value(intervention, n, float(f[feature]), unit)
    return after


def read_token(asked: Readings, x: Tensor, token: Token, steering: Steering, catalog: Catalog) -> Read | None:
    """What a reading has of one token, from what its site reads ``x [D]``; None where it does not read there."""
    if not in_positions(asked.positions, token):
        return None
    entry = catalog.sae(asked.sae)
    if asked.at == "after":
        f = activations_after(entry, x, token, steering, catalog)
    else:
        f = encode(entry.sae, x)
    largest = sorted((-float(value), feature) for feature, value in enumerate(f) if value > 0)[: asked.top_k]
    return Read([float(f[feature]) for feature in asked.features], [(feature, -value) for value, feature in largest])


def edit_tokens(
    x: Tensor, y: Tensor, site: Site, tokens: Sequence[Token], steering: Steering, catalog: Catalog
) -> Tensor:
    """:func:`edit_token` on each row of ``x [T, D]`` and ``y [T, D_out]``; returns ``y' [T, D_out]``."""
    rows = zip(x, y, tokens, strict=True)
    return torch.stack([edit_token(a, b, site, token, steering, catalog).y for a, b, token in rows])
