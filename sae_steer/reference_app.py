"""The definition of what a calibration says, literally and in float64: posterior probabilities by Bayes, bin by bin.

Part of :mod:`sae_steer.reference`; it reads the record's own numbers, and shares nothing with what compiles them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sae_steer.calibration.store import StoredCalibration
from sae_steer.catalog import Catalog
from sae_steer.schema import (
    LARGEST,
    AppEdit,
    CalibratedAblateEdit,
    CalibratedGainEdit,
    CalibratedMaskEdit,
    FeatureAblateEdit,
    FeatureMaskEdit,
    FeatureScaleEdit,
    Intervention,
    Positions,
    When,
)

_Rival = CalibratedAblateEdit | CalibratedGainEdit | CalibratedMaskEdit


@dataclass(frozen=True)
class Attenuation:
    """All ``app`` of one calibration together: ``f' = f (1 - sum of P(concept given f))^strength``.

    Args:
        sae: Name of the SAE.
        features: Those chosen for any of the concepts.
        stored: The calibration.
        concepts: What is attenuated.
        edit: Any of the interventions; they agree.
    """

    sae: str
    features: list[int]
    stored: StoredCalibration
    concepts: tuple[str, ...]
    edit: AppEdit
    op: str = "app"

    @property
    def positions(self) -> Positions:
        """Where it holds."""
        return self.edit.positions

    @property
    def skip_bos(self) -> bool:
        """Whether beginning-of-sequence tokens are left alone."""
        return self.edit.skip_bos

    @property
    def when(self) -> When | None:
        """Its gate."""
        return self.edit.when

    def new_value(self, feature: int, f: float) -> float:
        """``f'``."""
        gain = gain_of(self.stored, feature, f, self.concepts, self.edit.prior)
        return float(f * gain**self.edit.strength) if self.edit.strength else f


def prior_of(stored: StoredCalibration, concepts: Sequence[str], prior: str) -> list[float]:
    """The prior of each label."""
    labels, documents = stored.info.labels, stored.info.documents
    if prior == "uniform":
        return [1 / len(labels) for _ in labels]
    if prior == "target":
        rest = len(labels) - len(concepts)
        return [0.5 / len(concepts) if label in concepts else 0.5 / rest for label in labels]
    return [count / sum(documents) for count in documents]


def gain_of(stored: StoredCalibration, feature: int, f: float, concepts: Sequence[str], prior: str) -> float:
    """``G(f)``: 1 at ``f <= 0``; at the centre of a bin what Bayes says; between two centres on a straight line."""
    record = stored.record
    row = record.features.tolist().index(feature)
    if f <= 0 or sum(record.fired[row].tolist()) == 0:
        return 1.0
    priors = prior_of(stored, concepts, prior)
    bins = record.log_density.shape[2] - 1

    def at_centre(b: int) -> float:
        joint = [math.exp(float(record.log_density[row, c, 1 + b])) * p for c, p in enumerate(priors)]
        return 1 - sum(joint[stored.info.labels.index(concept)] for concept in concepts) / sum(joint)

    place = f / float(record.width[row]) - 0.5
    if place <= 0:
        return at_centre(0)
    if place >= bins - 1:
        return at_centre(bins - 1)
    left = math.floor(place)
    return at_centre(left) + (place - left) * (at_centre(left + 1) - at_centre(left))


def chosen(
    edit: CalibratedAblateEdit | CalibratedGainEdit | CalibratedMaskEdit | AppEdit, catalog: Catalog
) -> list[int]:
    """The features that a calibration chose for a concept, the best ``top`` of them, by number."""
    stored = catalog.calibration(edit.calibration, param="")
    column = stored.info.labels.index(edit.concept)
    ranks = stored.record.rank[:, column].tolist()
    most = math.inf if edit.top is None else edit.top
    return [f for f, rank in zip(stored.record.features.tolist(), ranks, strict=True) if 0 <= rank < most]


def written_out(edits: Sequence[Intervention], catalog: Catalog) -> list[Intervention | Attenuation]:
    """Interventions with those by a calibration written out: one for each feature, and ``app`` together."""
    found: list[Intervention | Attenuation] = []
    attenuations: dict[str, Attenuation] = {}
    for edit in edits:
        if isinstance(edit, AppEdit):
            stored = catalog.calibration(edit.calibration, param="")
            first = Attenuation(edit.sae, [], stored, (), edit)
            known = attenuations.get(stored.info.file, first)
            features = sorted({*known.features, *chosen(edit, catalog)})
            attenuations[stored.info.file] = replace(known, features=features, concepts=(*known.concepts, edit.concept))
        elif isinstance(edit, _Rival):
            found += _rivals(edit, catalog)
        else:
            found.append(edit)
    return [*found, *attenuations.values()]


def _rivals(
    edit: CalibratedAblateEdit | CalibratedGainEdit | CalibratedMaskEdit, catalog: Catalog
) -> Iterator[Intervention]:
    stored = catalog.calibration(edit.calibration, param="")
    column = stored.info.labels.index(edit.concept)
    record = stored.record
    place: dict[str, Any] = {"when": edit.when, "positions": edit.positions, "skip_bos": edit.skip_bos, "sae": edit.sae}
    for feature in chosen(edit, catalog):
        row = record.features.tolist().index(feature)
        if isinstance(edit, CalibratedAblateEdit):
            yield FeatureAblateEdit(**place, features=[feature], op="ablate")
        elif isinstance(edit, CalibratedGainEdit):
            auroc = float(record.auroc[row, column])
            aura = 1 - 2 * (auroc - 0.5) if auroc > 0.5 else 1.0
            gain = aura if edit.value is None else edit.value
            yield FeatureScaleEdit(**place, features=[feature], op="gain", value=gain)
        elif int(record.fired[row, column]):
            mean, std = float(record.mean[row, column]), float(record.std[row, column])
            lo, hi = mean - edit.sigmas * std, mean + edit.sigmas * std
            yield FeatureMaskEdit(**place, features=[feature], op="mask_range", lo=lo, hi=hi)
        else:  # it never fired for the concept: nothing is masked, since nothing is as large as that
            yield FeatureMaskEdit(**place, features=[feature], op="mask_range", lo=LARGEST, hi=LARGEST)
