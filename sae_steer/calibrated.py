"""From interventions by a calibration to rows: which features, and what is done to each.

``app`` takes a table of gains, its rivals a range, a constant or nothing at all; all of them from the same record.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sae_steer.calibration.gains import Prior, gains, log_prior
from sae_steer.calibration.store import StoredCalibration
from sae_steer.catalog import ANY_MODEL, Catalog, CatalogSae
from sae_steer.errors import RequestError
from sae_steer.program import GainTable, Row
from sae_steer.schema import LARGEST, AppEdit, CalibratedAblateEdit, CalibratedGainEdit, CalibratedMaskEdit

CalibratedEdit = CalibratedAblateEdit | CalibratedGainEdit | CalibratedMaskEdit | AppEdit


def rows_by_calibration(
    edits: Sequence[CalibratedEdit], paths: Sequence[str], catalog: Catalog
) -> tuple[CatalogSae, list[Row]]:
    """The SAE and the rows of an intervention, or of several ``app`` of one calibration that combine.

    Args:
        edits: The interventions, which agree in all but the concept and ``top``.
        paths: Their JSON paths, for errors.
        catalog: What the names mean.

    Raises:
        RequestError: A name that is not there, a calibration of another SAE, site or model, or too many features.
    """
    first, path = edits[0], paths[0]
    entry = catalog.sae(first.sae, param=f"{path}.sae")
    stored = catalog.calibration(first.calibration, param=f"{path}.calibration")
    _check_made_for(stored, entry, catalog, f"{path}.calibration")
    asked: dict[int, int | None] = {}
    for edit, where in zip(edits, paths, strict=True):
        concept = stored.concept(edit.concept, param=f"{where}.concept")
        asked[concept] = _top(stored, concept, edit, f"{where}.top")
    source = entry.sae.fingerprint
    if isinstance(first, AppEdit):
        try:
            return entry, list(_app_rows(stored, source, tuple(sorted(asked.items())), first.prior, first.strength))
        except ValueError as error:
            raise RequestError(f"{path}.prior: {error}.", param=f"{path}.prior", code="no_prior") from None
    [(concept, top)] = asked.items()
    return entry, list(_rival_rows(stored, source, concept, top, first))


def _check_made_for(stored: StoredCalibration, entry: CatalogSae, catalog: Catalog, path: str) -> None:
    """Raises :class:`RequestError` unless the calibration was made with this SAE, at this site, on this model."""
    info = stored.info
    checks = (
        ("SAE", info.sae_fingerprint, entry.sae.fingerprint, "fingerprint_mismatch"),
        ("site", info.site, str(entry.site), "site_mismatch"),
        ("model", info.model, catalog.model, "model_mismatch"),
    )
    for what, made_for, have, code in checks:
        if what == "model" and have == ANY_MODEL:
            continue
        if have is None:
            raise RequestError(
                f"{path}: calibration {stored.name!r} is for the model {made_for}, and this server cannot tell which "
                "model it has: its files are not on this machine, or of no known form.",
                param=path,
                code=code,
            )
        if made_for != have:
            raise RequestError(
                f"{path}: calibration {stored.name!r} was made for the {what} {made_for}, and this server has {have}. "
                "Calibrate again with `sae-steer calibrate`.",
                param=path,
                code=code,
            )
    if int(stored.record.features[-1]) >= entry.sae.spec.n_features:
        raise RequestError(
            f"{path}: calibration {stored.name!r} names features that its SAE does not have.",
            param=path,
            code="broken_profile",
        )


def _top(stored: StoredCalibration, concept: int, edit: CalibratedEdit, path: str) -> int | None:
    have = int((stored.record.rank[:, concept] >= 0).sum())
    if edit.top is not None and edit.top > have:
        raise RequestError(
            f"{path}: calibration {stored.name!r} chose {have} features for {edit.concept!r}, and {edit.top} are asked "
            "for. Leave 'top' out to take all of them.",
            param=path,
            code="out_of_range",
        )
    return edit.top


@lru_cache(maxsize=32)
def _app_rows(
    stored: StoredCalibration, source: str, asked: tuple[tuple[int, int | None], ...], prior: Prior, strength: float
) -> tuple[Row, ...]:
    """The rows of ``app``: over the features of all asked concepts, each with the gain of all of them together."""
    record, concepts = stored.record, [concept for concept, _ in asked]
    rows = torch.cat([record.chosen(concept)[:top] for concept, top in asked]).unique()  # type: ignore[no-untyped-call]
    tables = gains(record, rows, concepts, log_prior(stored.info, concepts, prior)).float()
    widths = record.width[rows].tolist()
    numbers = record.features[rows].tolist()
    return tuple(
        Row(source, feature, "app", gamma=strength, gain=GainTable.of(width, table))
        for feature, width, table in zip(numbers, widths, tables.numpy(), strict=True)
    )


def _rival_rows(
    stored: StoredCalibration,
    source: str,
    concept: int,
    top: int | None,
    edit: CalibratedAblateEdit | CalibratedGainEdit | CalibratedMaskEdit,
) -> tuple[Row, ...]:
    record = stored.record
    rows = record.chosen(concept)[:top].sort().values
    numbers: list[int] = record.features[rows].tolist()

    def of(values: Tensor) -> list[float]:
        return list(values[rows, concept].double().tolist())

    match edit:
        case CalibratedAblateEdit():
            return tuple(Row(source, feature, edit.op, scale=0.0) for feature in numbers)
        case CalibratedGainEdit():
            constants = [edit.value] * len(numbers) if edit.value is not None else map(aura_gain, of(record.auroc))
            return tuple(Row(source, f, edit.op, scale=gain) for f, gain in zip(numbers, constants, strict=True))
        case CalibratedMaskEdit():
            fired: list[int] = record.fired[rows, concept].tolist()
            spread = zip(numbers, fired, of(record.mean), of(record.std), strict=True)
            return tuple(_mask_row(source, edit, feature, n, mean, std) for feature, n, mean, std in spread)


def aura_gain(auroc: float) -> float:
    """AURA's gain of a unit (Suau et al. 2024): ``1 - 2 (auroc - 1/2)`` where it tells the concept, else 1."""
    return 1 - 2 * (auroc - 0.5) if auroc > 0.5 else 1.0


def _mask_row(source: str, edit: CalibratedMaskEdit, feature: int, fired: int, mean: float, std: float) -> Row:
    """A feature that never fired for the concept masks nothing."""
    if not fired:
        return Row(source, feature, edit.op)
    reach = edit.sigmas * std
    lo, hi = max(mean - reach, -LARGEST), min(mean + reach, LARGEST)
    return Row(source, feature, edit.op, mask_lo=lo, mask_hi=hi)
