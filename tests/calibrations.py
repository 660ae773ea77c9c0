"""Calibrations made up for tests: densities with an atom, whose shapes differ from feature to feature and concept."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sae_steer.calibration.info import CalibrationInfo, CalibrationSettings
from sae_steer.calibration.record import Calibration
from sae_steer.catalog import CatalogSae
from sae_steer.schema import Profile, parse_steering

BINS = 8


def made_up(
    features: Sequence[int], concepts: int, *, seed: int = 0, bins: int = BINS, largest: float = 8.0
) -> Calibration:
    """A calibration of some features.

    The first one never fired, and the second never for the first concept. Half of them, at the least, are chosen for
    each concept, in an order of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(features)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    density = draw(count, concepts, 1 + bins) ** 3 + 1e-4
    density[:, :, 0] += draw(count, concepts) * bins
    density[1 % count, 0, 1:] = 1e-5
    fired = (draw(count, concepts) * 100 + 1).long()
    fired[0], fired[1 % count, 0] = 0, 0
    mean, std = draw(count, concepts) * largest / 2 + 0.1, draw(count, concepts) + 0.1
    auroc, rank = draw(count, concepts), torch.full((count, concepts), -1, dtype=torch.int32)
    for concept in range(concepts):
        order = torch.randperm(count, generator=generator)[: max((count + 1) // 2, min(count, 3))]
        rank[order, concept] = torch.arange(len(order), dtype=torch.int32)
        auroc[order[0], concept] = 0.3
    return Calibration(
        features=torch.tensor(sorted(features)),
        width=largest / bins * (0.5 + draw(count)),
        log_density=(density / density.sum(dim=2, keepdim=True)).log(),
        fired=fired,
        mean=torch.where(fired > 0, mean, 0.0),
        std=torch.where(fired > 0, std, 0.0),
        auroc=auroc,
        separability=draw(count),
        rank=rank,
    )


def write_calibration(
    folder: Path,
    name: str,
    entry: CatalogSae,
    record: Calibration,
    *,
    labels: Sequence[str],
    model: str,
    concepts: Sequence[str] | None = None,
) -> Profile:
    """Writes a profile of that name, whose one edit is ``app`` of its first concept, as `sae-steer calibrate` does."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    settings = CalibrationSettings(
        bins=record.bins, alpha=0.5, quantile=0.999, smoothing=1.0, tokens="last", choice="separability", cap=512
    )
    concepts = list(labels) if concepts is None else list(concepts)
    info = CalibrationInfo(
        file=record.write(target),
        sae=entry.name,
        sae_fingerprint=entry.sae.fingerprint,
        model=model,
        site=str(entry.site),
        labels=list(labels),
        concepts=concepts,
        documents=[100 * (number + 1) for number in range(len(labels))],
        observations=[100 * (number + 1) for number in range(len(labels))],
        settings=settings,
    )
    edit = {"op": "app", "sae": entry.name, "calibration": name, "concept": concepts[0]}
    profile = Profile(
        name=name,
        interventions=parse_steering({"interventions": [edit]}).interventions,
        saes={entry.name: entry.sae.fingerprint},
        calibration=info,
    )
    (target / "profile.json").write_text(profile.model_dump_json(indent=2, exclude_defaults=True))
    return profile
