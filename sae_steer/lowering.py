"""From one intervention to rows: names resolved, units applied, every op as one affine-clip."""

from collections.abc import Sequence
from dataclasses import replace

from sae_steer.calibrated import CalibratedEdit, rows_by_calibration
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import DuplicateEdit, RequestError, SiteError, UnknownFeature, UnknownName, Unsupported
from sae_steer.program import Phase, Row
from sae_steer.sae import Activation
from sae_steer.schema import (
    LARGEST,
    AppEdit,
    CalibratedAblateEdit,
    CalibratedGainEdit,
    CalibratedMaskEdit,
    FeatureAblateEdit,
    FeatureMaskEdit,
    FeatureScaleEdit,
    FeatureValueEdit,
    Intervention,
    Positions,
    Ranges,
    VectorAblateEdit,
    VectorScaleEdit,
    VectorValueEdit,
)
from sae_steer.sites import Site


def rows_of(
    interventions: Sequence[Intervention], paths: Sequence[str], catalog: Catalog, sites: Sequence[Site]
) -> tuple[Site, list[Row]]:
    """The site and the rows of one intervention, without selectors and gates.

    Args:
        interventions: What was asked; more than one only of ``app``, where they combine.
        paths: Their JSON paths, for errors.
        catalog: What its names mean.
        sites: The hooked places, for plain vectors.

    Raises:
        RequestError: A name, a number or a unit that this catalog cannot honour.
    """
    path = paths[0]
    match intervention := interventions[0]:
        case VectorValueEdit() | VectorScaleEdit() | VectorAblateEdit():
            return _vector_rows(intervention, path, catalog, sites)
        case AppEdit() | CalibratedAblateEdit() | CalibratedGainEdit() | CalibratedMaskEdit():
            edits = [each for each in interventions if isinstance(each, CalibratedEdit)]
            entry, rows = rows_by_calibration(edits, paths, catalog)
            check_topk(entry, f"{path}.sae")
            return entry.site, rows
        case _:
            entry = catalog.sae(intervention.sae, param=f"{path}.sae")
            for i, feature in enumerate(intervention.features):
                check_feature(entry, feature, f"{path}.features[{i}]")
            check_topk(entry, f"{path}.sae")
            return entry.site, _feature_rows(intervention, path, entry)


def _feature_rows(
    edit: FeatureValueEdit | FeatureScaleEdit | FeatureAblateEdit | FeatureMaskEdit, path: str, entry: CatalogSae
) -> list[Row]:
    base = [Row(entry.sae.fingerprint, feature, edit.op) for feature in edit.features]
    if len(set(edit.features)) != len(edit.features):
        twice = next(f for f in edit.features if edit.features.count(f) > 1)
        raise DuplicateEdit(f"{path}.features: feature {twice} is named twice.", param=f"{path}.features")
    match edit:
        case FeatureAblateEdit():
            return [replace(row, scale=0.0) for row in base]
        case FeatureMaskEdit():
            return [replace(row, mask_lo=edit.lo, mask_hi=edit.hi) for row in base]
        case FeatureScaleEdit():
            return [replace(row, scale=v) for row, v in zip(base, _values(edit.value, len(base), path), strict=True)]
        case FeatureValueEdit():
            values = _values(edit.value, len(base), path)
            if edit.units == "reference_max":
                values = [_of_maximum(entry, row.feature, v, path) for v, row in zip(values, base, strict=True)]
            norm = edit.units == "residual_norm"
            return [_value_row(row, edit.op, v, norm) for row, v in zip(base, values, strict=True)]


def _value_row(row: Row, op: str, value: float, norm_units: bool) -> Row:
    """``clamp``, ``add``, ``floor`` and ``cap`` as ``clip(a f + c, lo, hi)``."""
    match op:
        case "clamp":
            return replace(row, scale=0.0, shift=value, norm_units=norm_units)
        case "add":
            return replace(row, shift=value, norm_units=norm_units)
        case "floor":
            return replace(row, lo=value, norm_units=norm_units)
        case _:
            return replace(row, hi=value, norm_units=norm_units)


def _vector_rows(
    edit: VectorValueEdit | VectorScaleEdit | VectorAblateEdit, path: str, catalog: Catalog, sites: Sequence[Site]
) -> tuple[Site, list[Row]]:
    """A plain direction as one row: ``add`` writes the vector as it is, the other ops act along the unit direction."""
    vector = catalog.vector(edit.vector, param=f"{path}.vector")
    try:
        site = Site.parse(edit.site)
    except SiteError as error:
        raise UnknownName(f"{path}.site: {error.message}", param=f"{path}.site", code="unknown_site") from None
    if site not in sites or site.read != site.write:
        known = ", ".join(str(s) for s in sites if s.read == s.write) or "none"
        raise UnknownName(
            f"{path}.site: {edit.site!r} is not a hooked site. Hooked: {known}. More are hooked at start.",
            param=f"{path}.site",
            code="unknown_site",
        )
    row = Row(vector.fingerprint, -1, edit.op, unit=edit.op != "add")
    match edit:
        case VectorAblateEdit():
            return site, [replace(row, scale=0.0)]
        case VectorScaleEdit():
            return site, [replace(row, scale=edit.value)]
        case VectorValueEdit():
            return site, [_value_row(row, edit.op, edit.value, edit.units == "residual_norm")]


def _values(value: float | list[float], count: int, path: str) -> list[float]:
    """One value for each feature."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(
            f"{path}.value: {len(value)} values for {count} features. Give one number, or one per feature.",
            param=f"{path}.value",
            code="wrong_length",
        )
    return value


def _of_maximum(entry: CatalogSae, feature: int, value: float, path: str) -> float:
    """A multiple of the recorded maximum of a feature, in the file's own units."""
    label = entry.labels.get(feature) if entry.labels is not None else None
    if label is None or label.reference_max is None:
        raise Unsupported(
            f"{path}.units: no reference maximum is recorded for feature {feature} of {entry.name!r}. Use units 'raw'.",
            param=f"{path}.units",
            code="no_reference_max",
        )
    found = value * label.reference_max
    if abs(found) > LARGEST:
        raise RequestError(
            f"{path}.value: {value:g} times the reference maximum of feature {feature} of {entry.name!r}, "
            f"{label.reference_max:g}, is beyond {LARGEST:g}. Ask for less, or use units 'raw'.",
            param=f"{path}.value",
            code="out_of_range",
        )
    return found


def check_feature(entry: CatalogSae, feature: int, path: str) -> None:
    """Raises :class:`UnknownFeature` for a number outside the dictionary."""
    count = entry.sae.spec.n_features
    if feature >= count:
        raise UnknownFeature(
            f"{path}: SAE {entry.name!r} has features 0 to {count - 1}; there is no {feature}.", param=path
        )


def hold_whole(entry: CatalogSae) -> str:
    """What to do where the whole dictionary of an SAE is needed."""
    return f'Start the server with --whole {entry.name} (in a vLLM configuration: "whole": true).'


def check_topk(entry: CatalogSae, path: str) -> None:
    """A TopK feature's activation depends on all others, so its whole dictionary must be at hand."""
    if entry.sae.spec.activation is Activation.TOPK and not entry.whole:
        raise Unsupported(
            f"{path}: {entry.name!r} is a TopK SAE, whose activations depend on its whole dictionary, and only "
            f"single rows of it are loaded. {hold_whole(entry)}",
            param=path,
        )


def positions_of(positions: Positions) -> tuple[Phase, tuple[tuple[int, int], ...]]:
    """The positions of a selector; ranges in order, and those that touch as one."""
    if isinstance(positions, Ranges):
        merged: list[tuple[int, int]] = []
        for start, end in sorted((start, end) for start, end in positions.ranges):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        return Phase.RANGES, tuple(merged)
    return Phase(positions), ()
