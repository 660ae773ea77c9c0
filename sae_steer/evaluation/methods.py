"""The methods that are compared, each with the one knob that makes it stronger.

All of them act on the same features, those that the calibration chose for the concept. By
method, its knob from mild to strong, and what it does:

- ``full-mask``, number of features, the best first: f' = 0.
- ``range-mask``, standard deviations: f' = 0 within so many of the concept's mean activation.
- ``aura``, a share: f' = max(0, 1 - share (1 - g)) f, with g = 1 - 2 (AUROC - 1/2) where that is below 1.
- ``dampening``, a falling gain: f' = gain f, one for all.
- ``app``, the strength: f' = f (1 - P(concept given f))^strength.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_steer.calibrated import aura_gain
from sae_steer.calibration.store import StoredCalibration
from sae_steer.errors import StartError

NAMES = ("full-mask", "range-mask", "aura", "dampening", "app")
STRENGTHS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Method:
    """A method and its knob.

    Args:
        name: One of :data:`NAMES`.
        knob: What is turned, in words.
        defaults: Settings that are reported as they are.
        off: The setting at which it does nothing.
        grid: Settings from mild to strong, where a search for a given removal starts.
        request: From a setting to the field ``steering``.
        whole: Whether settings are whole numbers.
    """

    name: str
    knob: str
    defaults: tuple[float, ...]
    off: float
    grid: tuple[float, ...]
    request: Callable[[float], dict[str, Any]]
    whole: bool = False

    def place(self, setting: float) -> float:
        """Rises from mild to strong."""
        return abs(setting - self.off)

    def between(self, mild: float, strong: float) -> float | None:
        """A setting between two others; None where there is none."""
        if self.whole:
            middle = round((mild + strong) / 2)
            return float(middle) if min(mild, strong) < middle < max(mild, strong) else None
        return (mild + strong) / 2


def methods(
    stored: StoredCalibration,
    *,
    sae: str,
    calibration: str,
    concept: str,
    strengths: Sequence[float] = STRENGTHS,
    names: Sequence[str] = NAMES,
) -> list[Method]:
    """The methods by a calibration.

    Args:
        stored: The calibration.
        sae: The SAE's name in requests.
        calibration: The calibration's name in requests.
        concept: What is to be removed.
        strengths: Settings of ``app`` that are reported as they are.
        names: Which methods.

    Raises:
        StartError: There is no such method.
        UnknownName: There is no such concept.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise StartError(f"There is no method {unknown[0]!r}. Methods: {', '.join(NAMES)}.")
    by: dict[str, Any] = {"sae": sae, "calibration": calibration, "concept": concept}

    def asked(**edit: Any) -> dict[str, Any]:
        return {"interventions": [by | edit]}

    column = stored.concept(concept, param="concept")
    rows = stored.record.chosen(column)
    features = stored.record.features[rows].tolist()
    gains = np.array([aura_gain(auroc) for auroc in stored.record.auroc[rows, column].tolist()])

    def aura(share: float) -> dict[str, Any]:
        if share == 1:
            return asked(op="gain")
        values = np.maximum(0.0, 1 - share * (1 - gains)).tolist()
        return {"interventions": [{"sae": sae, "features": features, "op": "gain", "value": values}]}

    count = len(features)
    tops = tuple(sorted({float(round(count**share)) for share in np.linspace(0, 1, 7)}))
    found = {
        "full-mask": Method(
            "full-mask", "features", (float(count),), 0.0, tops, lambda n: asked(op="ablate", top=int(n)), whole=True
        ),
        "range-mask": Method(
            "range-mask",
            "standard deviations",
            (2.0,),
            0.0,
            (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
            lambda sigmas: asked(op="mask_range", sigmas=sigmas),
        ),
        "aura": Method("aura", "share", (1.0,), 0.0, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), aura),
        "dampening": Method(
            "dampening", "gain", (0.5,), 1.0, (0.9, 0.75, 0.5, 0.25, 0.0), lambda gain: asked(op="gain", value=gain)
        ),
        "app": Method(
            "app",
            "strength",
            tuple(strengths),
            0.0,
            (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
            lambda strength: asked(op="app", strength=strength),
        ),
    }
    return [found[name] for name in NAMES if name in names]
