"""From what a user sent to a program: gather, merge, resolve, check. One function a pass.

Everything that can be refused is refused here, before any model work, with the JSON path of the field at fault.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sae_steer.capabilities import Capabilities
from sae_steer.catalog import Catalog
from sae_steer.errors import DuplicateEdit, LimitExceeded, RequestError, Unsupported
from sae_steer.limits import Limits
from sae_steer.lowering import check_feature, check_topk, hold_whole, positions_of, rows_of
from sae_steer.program import Gate, Program, Row, Selector, SiteProgram
from sae_steer.read_compiler import with_readings
from sae_steer.sae import InputNorm
from sae_steer.schema import (
    AppEdit,
    Intervention,
    Steering,
    VectorAblateEdit,
    VectorScaleEdit,
    VectorValueEdit,
    When,
)
from sae_steer.sites import Site

_VECTORS = VectorValueEdit | VectorScaleEdit | VectorAblateEdit
MAX_SELECTORS = 31  # a token carries its selectors as the bits of an int32


@dataclass(frozen=True, slots=True)
class _Edit:
    """An intervention and where it was written; ``more`` combine with it to one gain."""

    intervention: Intervention
    path: str
    profile: str | None
    more: tuple["_Edit", ...] = ()


@dataclass(slots=True)
class _SiteBuilder:
    """The rows of one site while they are being gathered: one for each (source, feature)."""

    site: Site
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    edits: dict[tuple[str, int], _Edit] = field(default_factory=dict)

    def gate_row(self, source: str, feature: int) -> int:
        """The number of a row that is read, making one that edits nothing where there is none yet."""
        self.rows.setdefault((source, feature), Row(source, feature))
        return list(self.rows).index((source, feature))


def compile_program(
    steering: Steering,
    catalog: Catalog,
    capabilities: Capabilities,
    limits: Limits,
    *,
    sites: Sequence[Site],
    bos_token_id: int | None,
) -> Program | None:
    """Compiles a validated ``steering`` field.

    Args:
        steering: What the user sent.
        catalog: What the names mean.
        capabilities: What the host can honour.
        limits: What the host holds.
        sites: The places that the host has hooked.
        bos_token_id: The model's beginning-of-sequence token, for ``skip_bos``.

    Returns:
        The program, or None where nothing is asked.

    Raises:
        RequestError: Any of its subclasses, with ``param`` set.
    """
    _require(steering, capabilities)
    dose = steering.dose
    if dose is not None and dose.limit > limits.dose_limit:
        raise LimitExceeded(
            f"steering.dose.limit: {dose.limit:g} is more than this server allows, {limits.dose_limit:g}.",
            param="steering.dose.limit",
        )
    edits = list(_gather(steering, catalog))
    if not edits and steering.error == "drop":
        raise Unsupported(
            "steering.error: 'drop' drops the error of the SAE whose features are edited, and none is. To write "
            "the plain reconstruction, scale one feature by 1.",
            param="steering.error",
        )
    asks = steering.readings is not None or bool(steering.on)
    if not edits and not asks:
        return None
    builders: dict[Site, _SiteBuilder] = {}
    for edit in edits:
        _require_edit(edit, capabilities)
    for edit in _combined(edits, catalog, override=steering.override):
        _resolve(edit, catalog, sites, builders, override=steering.override)
    for builder in builders.values():
        builder.rows = dict(sorted(builder.rows.items()))  # programs that mean the same are the same
        builder.edits = dict(sorted(builder.edits.items()))
    selectors = _selectors(builders, bos_token_id)
    _gates(catalog, builders)
    drops = _drops(steering, catalog, builders)
    program = Program(
        sites=tuple(
            SiteProgram(builder.site, tuple(builder.rows.values()), drops.get(builder.site))
            for builder in sorted(builders.values(), key=_place)
        ),
        selectors=tuple(selectors),
        dose_limit=min(dose.limit if dose else math.inf, limits.dose_limit),
        on_dose=dose.on_dose if dose else "fail",
    )
    if asks:
        program = with_readings(program, steering, catalog)
    _check_limits(program, limits)
    return program


def _place(builder: _SiteBuilder) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sorts sites in the model's order."""
    return builder.site.write.order, builder.site.read.order


def _require(steering: Steering, capabilities: Capabilities) -> None:
    """Refuses what the host cannot honour, of the fields beside the interventions."""
    if steering.readings is not None:
        capabilities.require("readings", param="steering.readings")
    if steering.on:
        capabilities.require("on", param="steering.on")
    for i, trigger in enumerate(steering.on):
        if trigger.action == "stop":
            capabilities.require("on.stop", param=f"steering.on[{i}].action")
    if steering.error == "drop":
        capabilities.require("error.drop", param="steering.error")
    if steering.dose is not None:
        capabilities.require("dose", param="steering.dose")
    if steering.profiles:
        capabilities.require("profiles", param="steering.profiles")


def _require_edit(edit: _Edit, capabilities: Capabilities) -> None:
    """Refuses what the host cannot honour, of one intervention."""
    capabilities.require(f"op.{edit.intervention.op}", param=f"{edit.path}.op")
    if edit.intervention.when is not None:
        capabilities.require("when", param=f"{edit.path}.when")
    if edit.intervention.positions != "all":
        capabilities.require("positions", param=f"{edit.path}.positions")


def _gather(steering: Steering, catalog: Catalog) -> Iterator[_Edit]:
    """The edits of the profiles, in order, then those of the request itself."""
    for number, name in enumerate(steering.profiles):
        param = f"steering.profiles[{number}]"
        if name in steering.profiles[:number]:
            raise DuplicateEdit(f"{param}: the profile {name!r} is named twice.", param=param)
        try:
            profile = catalog.profile(name)
        except RequestError as error:  # also of a file that is broken
            error.param = param
            raise
        for sae, fingerprint in profile.saes.items():
            have = catalog.sae(sae, param=param).sae.fingerprint
            if have != fingerprint:
                raise RequestError(
                    f"{param}: profile {name!r} was made for SAE {sae!r} {fingerprint}, and this server has {have}.",
                    param=param,
                    code="fingerprint_mismatch",
                )
        for i, intervention in enumerate(profile.interventions):
            yield _Edit(intervention, f"{param}.interventions[{i}]", name)
    for i, intervention in enumerate(steering.interventions):
        yield _Edit(intervention, f"steering.interventions[{i}]", None)


_AGREE = ("sae", "strength", "prior", "when", "positions", "skip_bos")


def _combined(edits: Sequence[_Edit], catalog: Catalog, *, override: bool) -> list[_Edit]:
    """Puts several ``app`` of one calibration together; with ``override``, the request's apart from the profiles'.

    Raises:
        RequestError: They do not agree in what one gain can have but once, or name one concept twice.
    """
    found: dict[object, _Edit] = {}
    for number, edit in enumerate(edits):
        key: object = number
        if isinstance(edit.intervention, AppEdit):
            stored = catalog.calibration(edit.intervention.calibration, param=f"{edit.path}.calibration")
            key = (stored.info.file, override and edit.profile is None)
        if key not in found:
            found[key] = edit
            continue
        first = found[key]
        for other in (first, *first.more):
            _check_combines(edit, other)
        found[key] = replace(first, more=(*first.more, edit))
    return list(found.values())


def _check_combines(edit: _Edit, other: _Edit) -> None:
    mine, theirs = edit.intervention, other.intervention
    assert isinstance(mine, AppEdit)  # by what they were put together by
    assert isinstance(theirs, AppEdit)
    if mine.concept == theirs.concept:
        raise DuplicateEdit(
            f"{edit.path}.concept: {mine.concept!r} is attenuated already, by {other.path}. Name it once"
            f"{_instead(edit, other)}.",
            param=f"{edit.path}.concept",
        )
    for name in _AGREE:
        if getattr(mine, name) != getattr(theirs, name):
            raise DuplicateEdit(
                f"{edit.path}.{name}: several concepts of one calibration make one gain, and {name!r} is not what "
                f"{other.path} has. Give both the same{_instead(edit, other)}.",
                param=f"{edit.path}.{name}",
            )


def _instead(edit: _Edit, earlier: _Edit) -> str:
    """What a request may do about a profile's edit."""
    if edit.profile is None and earlier.profile is not None:
        return ', or say "override": true to replace the profile\'s edit'
    return ""


def _resolve(
    edit: _Edit, catalog: Catalog, sites: Sequence[Site], builders: dict[Site, _SiteBuilder], *, override: bool
) -> None:
    """Turns one intervention into rows of its site; a later edit of the same feature is an error or an override."""
    whole = (edit, *edit.more)
    site, rows = rows_of([part.intervention for part in whole], [part.path for part in whole], catalog, sites)
    builder = builders.setdefault(site, _SiteBuilder(site))
    for row in rows:
        key = (row.source, row.feature)
        earlier = builder.edits.get(key)
        if earlier is not None and not (override and earlier.profile is not None and edit.profile is None):
            what = f"feature {row.feature}" if row.feature >= 0 else "the vector"
            raise DuplicateEdit(
                f"{edit.path}: {what} is edited already, by {earlier.path}. Edit it once{_instead(edit, earlier)}.",
                param=edit.path,
            )
        builder.rows[key] = row
        builder.edits[key] = edit


def _selectors(builders: dict[Site, _SiteBuilder], bos_token_id: int | None) -> dict[Selector, int]:
    """Numbers the selectors of the edits that were not overridden, and gives each row its own."""
    selectors: dict[Selector, int] = {}
    for builder in sorted(builders.values(), key=_place):
        for key, edit in builder.edits.items():
            number = selectors.setdefault(_selector(edit, bos_token_id), len(selectors))
            builder.rows[key] = replace(builder.rows[key], selector=number)
    return selectors


def _selector(edit: _Edit, bos_token_id: int | None) -> Selector:
    """The positions and token ids on which an edit holds."""
    intervention = edit.intervention
    if intervention.skip_bos and bos_token_id is None:
        raise Unsupported(
            f"{edit.path}.skip_bos: this model has no beginning-of-sequence token. Leave 'skip_bos' out.",
            param=f"{edit.path}.skip_bos",
        )
    phase, ranges = positions_of(intervention.positions)
    tokens = intervention.when.token_in if intervention.when else None
    return Selector(
        phase,
        ranges,
        bos_token_id if intervention.skip_bos else None,
        tuple(sorted(set(tokens))) if tokens is not None else None,
    )


def _gates(catalog: Catalog, builders: dict[Site, _SiteBuilder]) -> None:
    """Attaches the feature gates, once all rows are there to be referred to."""
    for builder in list(builders.values()):
        for key, edit in list(builder.edits.items()):
            when = edit.intervention.when
            if when is not None and when.sae is not None:
                builder.rows[key] = replace(builder.rows[key], gate=_gate(when, edit.path, builder, catalog))


def _gate(when: When, path: str, builder: _SiteBuilder, catalog: Catalog) -> Gate:
    assert when.sae is not None  # the schema demands sae and feature together
    assert when.feature is not None
    entry = catalog.sae(when.sae, param=f"{path}.when.sae")
    if entry.site != builder.site:
        raise Unsupported(
            f"{path}.when.sae: {when.sae!r} reads {entry.site}, and the edit is at {builder.site}. "
            "A gate must be at the same site.",
            param=f"{path}.when.sae",
        )
    check_feature(entry, when.feature, f"{path}.when.feature")
    check_topk(entry, f"{path}.when.sae")
    row = builder.gate_row(entry.sae.fingerprint, when.feature)
    above = when.above if when.above is not None else -math.inf
    return Gate(row, above, when.below if when.below is not None else math.inf)


def _drops(steering: Steering, catalog: Catalog, builders: dict[Site, _SiteBuilder]) -> dict[Site, str]:
    """The SAE whose reconstruction error is dropped at each site: exactly one there, whole, and exactly decodable."""
    if steering.error == "keep":
        return {}
    found: dict[Site, str] = {}
    for site, builder in builders.items():
        sources = {source for source, _ in builder.rows}
        # By the names that the edits use: one file may be in the catalog twice, and held whole once.
        named = [edit.intervention for edit in builder.edits.values()]
        saes = {i.sae: catalog.sae(i.sae) for i in named if not isinstance(i, _VECTORS)}
        if len(sources) != 1 or not saes:
            raise Unsupported(
                f"steering.error: 'drop' replaces the tensor at {site} by one SAE's decoding, and this request uses "
                f"{len(sources)} there (SAEs, vectors). Use one SAE alone, or 'keep'.",
                param="steering.error",
            )
        entry = next((entry for entry in saes.values() if not entry.whole), next(iter(saes.values())))
        if not entry.whole:
            raise Unsupported(
                f"steering.error: 'drop' needs the whole dictionary of {entry.name!r}, and only single rows of it are "
                f"loaded. {hold_whole(entry)}",
                param="steering.error",
            )
        if site.read != site.write and entry.sae.spec.input_norm is not InputNorm.NONE:
            raise Unsupported(
                f"steering.error: {entry.name!r} normalises its input and writes elsewhere, so its decoding has no "
                "exact scale. Use 'keep'.",
                param="steering.error",
            )
        if entry.sae.spec.skip:
            raise Unsupported(
                f"steering.error: the reconstruction of {entry.name!r} has a term of its input besides the features "
                "(W_skip), which is not computed here. Use 'keep'.",
                param="steering.error",
            )
        found[site] = entry.sae.fingerprint
    return found


def _check_limits(program: Program, limits: Limits) -> None:
    """Refuses what no slot of this host could hold."""
    for part, param in ((program.edits, "steering.interventions"), (program, "steering.readings")):
        if part is None:
            continue
        edited = sum(row.selector >= 0 for site in part.sites for row in site.rows)
        checks = (
            (edited, limits.max_edits, "edited features in one request", _wider("max_edits", "max_edits")),
            (
                part.rows,
                limits.widest,
                "features (edited, gating or read) at one site",
                _wider("wide_features", "wide_rows"),
            ),
            (
                len(part.selectors),
                MAX_SELECTORS,
                "different combinations of positions, skip_bos and token_in",
                "Ask for fewer.",
            ),
        )
        for have, most, what, instead in checks:
            if have > most:
                raise LimitExceeded(f"{param}: {have} {what}; this server holds {most}. {instead}", param=param)


def _wider(option: str, field: str) -> str:
    """What to do about too many features."""
    return (
        f'Ask for fewer (of a calibration: "top"), or start the server with --{option.replace("_", "-")} N (in a vLLM '
        f"configuration: limits.{option}; with attach: Limits({field}=N))."
    )
