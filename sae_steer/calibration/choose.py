"""Which features stand for a concept, and the calibration of those."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.calibration.estimate import Estimate, blocks
from sae_steer.calibration.info import CalibrationSettings
from sae_steer.calibration.record import Calibration
from sae_steer.calibration.statistics import Statistics
from sae_steer.errors import DataError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feature as evidence for one label.

    Args:
        feature: Its number.
        score: By what it was ranked.
        distance: Jensen-Shannon distance of the label from all others together.
        dprime: Difference of the means, in pooled standard deviations.
        auroc: Probability that an observation of the label is above another.
        rate: Share of the label's observations on which it fires.
        rate_rest: Of the others.
    """

    feature: int
    score: float
    distance: float
    dprime: float
    auroc: float
    rate: float
    rate_rest: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Args:
        candidates: For each concept its features, the best first.
        never_fired: Features that fired on no observation.
        separability: ``[alive]`` mean Jensen-Shannon distance over pairs of labels of each feature that fired.
        alive: ``[alive]`` int64, their numbers.
    """

    candidates: tuple[tuple[Candidate, ...], ...]
    never_fired: int
    separability: NDArray[np.float64]
    alive: NDArray[np.int64]


def choose(
    statistics: Statistics, documents: Sequence[int], settings: CalibrationSettings, concepts: Sequence[int]
) -> Choice:
    """Ranks the features that are higher where a concept is, and takes the best of each concept.

    A feature that tells a concept by being silent there is evidence too, but there is nothing of it to suppress.
    """
    alive = np.flatnonzero(statistics.fired.sum(axis=1))
    best: list[list[Candidate]] = [[] for _ in concepts]
    distances: list[NDArray[np.float64]] = []
    for estimate in blocks(statistics, documents, settings, alive):
        distances.append(estimate.separability)
        for place, concept in enumerate(concepts):
            found = best[place] + _candidates(estimate, concept, statistics.observations, settings.choice)
            best[place] = sorted(found, key=lambda c: (-c.score, c.feature))[: settings.cap]
    return Choice(
        tuple(map(tuple, best)),
        statistics.features - alive.size,
        np.concatenate(distances) if distances else np.zeros(0),
        alive,
    )


def _candidates(estimate: Estimate, concept: int, seen: NDArray[np.int64], choice: str) -> list[Candidate]:
    higher = np.flatnonzero((estimate.auroc[:, concept] > 0.5) & (estimate.fired[:, concept] > 0))
    score = estimate.distance if choice == "separability" else estimate.dprime
    rest = estimate.fired.sum(axis=1) - estimate.fired[:, concept]
    return [
        Candidate(
            feature=int(estimate.features[i]),
            score=float(score[i, concept]),
            distance=float(estimate.distance[i, concept]),
            dprime=float(estimate.dprime[i, concept]),
            auroc=float(estimate.auroc[i, concept]),
            rate=float(estimate.fired[i, concept] / max(seen[concept], 1)),
            rate_rest=float(rest[i] / max(seen.sum() - seen[concept], 1)),
        )
        for i in higher
    ]


def calibration_of(
    statistics: Statistics,
    documents: Sequence[int],
    settings: CalibrationSettings,
    concepts: Sequence[int],
    choice: Choice,
) -> Calibration:
    """The calibration of all features that were chosen for any of the ``concepts``.

    Raises:
        DataError: None was chosen for one of them.
    """
    if not all(choice.candidates):
        raise DataError(
            "No feature fires more where a concept is than elsewhere, so there is nothing to choose. Is this the "
            "SAE's own model and place, and are the labels the right way round?"
        )
    features = np.array(sorted({c.feature for found in choice.candidates for c in found}), dtype=np.int64)
    rank = np.full((features.size, statistics.labels), -1, dtype=np.int32)
    for concept, found in zip(concepts, choice.candidates, strict=True):
        places = np.searchsorted(features, [c.feature for c in found])
        rank[places, concept] = np.arange(len(found))
    parts = list(blocks(statistics, documents, settings, features))

    def joined(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])).to(dtype)

    return Calibration(
        features=torch.from_numpy(features),
        width=joined("width"),
        log_density=torch.from_numpy(np.concatenate([np.log(part.density) for part in parts])).float(),
        fired=joined("fired", torch.int64),
        mean=joined("mean"),
        std=joined("std"),
        auroc=joined("auroc"),
        separability=joined("separability"),
        rank=torch.from_numpy(rank),
    )
