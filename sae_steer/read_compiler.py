"""From the fields ``readings`` and ``on`` to what a program reads: rows that edit nothing, and selectors."""

from collections.abc import Sequence
from dataclasses import replace

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import LimitExceeded, RequestError, Unsupported
from sae_steer.lowering import check_feature, check_topk, hold_whole, positions_of
from sae_steer.program import Phase, Program, Reading, Row, Selector, SiteProgram, Trigger
from sae_steer.schema import MAX_READ_FEATURES, Readings, Steering
from sae_steer.sites import Site


class _Reads:
    """A program while what it reads is added to it."""

    def __init__(self, program: Program) -> None:
        self.parts: dict[Site, SiteProgram] = {part.site: part for part in program.sites}
        self.selectors = list(program.selectors)

    def row(self, entry: CatalogSae, feature: int) -> int:
        """The number of the row of a feature, made where there is none; rows that are only read come last."""
        part = self.parts.setdefault(entry.site, SiteProgram(entry.site, ()))
        source = entry.sae.fingerprint
        for i, row in enumerate(part.rows):
            if (row.source, row.feature) == (source, feature):
                return i
        self.parts[entry.site] = replace(part, rows=(*part.rows, Row(source, feature)))
        return len(part.rows)

    def selector(self, phase: Phase, ranges: tuple[tuple[int, int], ...] = ()) -> int:
        """The number of a selector, made where there is none."""
        wanted = Selector(phase, ranges)
        if wanted not in self.selectors:
            self.selectors.append(wanted)
        return self.selectors.index(wanted)


def with_readings(program: Program, steering: Steering, catalog: Catalog) -> Program:
    """A program of edits, perhaps none, with what the request wants to be told.

    Raises:
        RequestError: An SAE, a feature or a number that cannot be read; ``param`` is the field at fault.
    """
    reads = _Reads(program)
    readings = [_reading(asked, path, reads, catalog) for asked, path in asked_readings(steering)]
    triggers: list[Trigger] = []
    for i, asked in enumerate(steering.on):
        path = f"steering.on[{i}]"
        entry = catalog.sae(asked.sae, param=f"{path}.sae")
        check_feature(entry, asked.feature, f"{path}.feature")
        check_topk(entry, f"{path}.sae")
        row, selector = reads.row(entry, asked.feature), reads.selector(Phase.COMPLETION)
        triggers.append(Trigger(entry.site, row, selector, asked.above, asked.action == "stop"))
    _check_number(readings)
    parts = sorted(reads.parts.values(), key=lambda part: (part.site.write.order, part.site.read.order))
    return replace(
        program,
        sites=tuple(parts),
        selectors=tuple(reads.selectors),
        readings=tuple(readings),
        triggers=tuple(triggers),
    )


def asked_readings(steering: Steering) -> list[tuple[Readings, str]]:
    """The readings of a request and where they were written."""
    if steering.readings is None:
        return []
    if isinstance(steering.readings, Readings):
        return [(steering.readings, "steering.readings")]
    return [(asked, f"steering.readings[{i}]") for i, asked in enumerate(steering.readings)]


def _reading(asked: Readings, path: str, reads: _Reads, catalog: Catalog) -> Reading:
    entry = catalog.sae(asked.sae, param=f"{path}.sae")
    for i, feature in enumerate(asked.features):
        check_feature(entry, feature, f"{path}.features[{i}]")
    if asked.features:
        check_topk(entry, f"{path}.sae")
    if asked.top_k:
        _check_top_k(entry, asked.top_k, path)
    reads.parts.setdefault(entry.site, SiteProgram(entry.site, ()))
    rows = tuple(reads.row(entry, feature) for feature in asked.features)
    return Reading(
        site=entry.site,
        source=entry.sae.fingerprint,
        rows=rows,
        selector=reads.selector(*positions_of(asked.positions)),
        top_k=asked.top_k,
        after=asked.at == "after",
        per_token=asked.per_token,
    )


def _check_top_k(entry: CatalogSae, top_k: int, path: str) -> None:
    """Refuses what the dictionary does not have, or is not there to be compared."""
    features = entry.sae.spec.n_features
    if top_k > features:
        raise RequestError(
            f"{path}.top_k: SAE {entry.name!r} has {features} features, and {top_k} were asked for.",
            param=f"{path}.top_k",
            code="out_of_range",
        )
    if not entry.whole:
        raise Unsupported(
            f"{path}.top_k: the largest features of a token are found by computing the whole dictionary of "
            f"{entry.name!r}, and only single rows of it are loaded. {hold_whole(entry)} Or name 'features'.",
            param=f"{path}.top_k",
        )


def _check_number(readings: Sequence[Reading]) -> None:
    named = sum(len(reading.rows) for reading in readings)
    if named > MAX_READ_FEATURES:
        raise LimitExceeded(
            f"steering.readings: {named} features are named, and one request may have {MAX_READ_FEATURES} read.",
            param="steering.readings",
        )
