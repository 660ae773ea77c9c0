"""What a host counts of steering's blocks, in Prometheus' form: readings, triggers, features and doses."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

FEATURES = 64
"""Different features that are counted by number; those that come later are counted together."""
_OTHERS = "other"
_DOSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class BlockMetrics:
    """Counters over the blocks of all choices. Safe to call from any thread.

    Args:
        registry: Where they are registered; once in each.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._readings = Counter(
            "sae_steer_reading_values", "Activations of single tokens that were sent back.", registry=registry
        )
        self._triggers = Counter(
            "sae_steer_trigger_fired", "Tokens on which a trigger fired.", ["action"], registry=registry
        )
        self._features = Counter(
            "sae_steer_feature_fired",
            f"Tokens on which a feature was changed by an edit, or read above 0; the first {FEATURES} features to come "
            f"have a number, all others are '{_OTHERS}'.",
            ["what", "sae", "feature"],
            registry=registry,
        )
        self._dose = Histogram(
            "sae_steer_dose",
            "Largest dose of an answer: the length of what was added to a token, over the token's.",
            buckets=_DOSES,
            registry=registry,
        )
        self._known: set[tuple[str, int]] = set()

    def values(self, count: int) -> None:
        """Counts activations that are sent back."""
        self._readings.inc(count)

    def choice(self, block: Mapping[str, Any]) -> None:
        """Counts the block of a choice that has ended."""
        applied = block["applied"]
        if applied["tokens"]:
            self._dose.observe(applied["dose"]["max"])
        for entry in applied["features"]:
            if "feature" in entry:
                self._fired("edited", entry["sae"], entry["feature"], entry["fired"])
        for reading in block.get("readings", ()):
            for sums in reading["summary"]:
                self._fired("read", reading["sae"], sums["feature"], round(sums["fired"] * sums["tokens"]))
        for trigger in block.get("triggers", ()):
            self._triggers.labels(trigger["action"]).inc(trigger["fired"])

    def _fired(self, what: str, sae: str, feature: int, times: int) -> None:
        if not times:
            return
        key = sae, feature
        if key not in self._known and len(self._known) < FEATURES:
            self._known.add(key)
        labels = (sae, str(feature)) if key in self._known else (_OTHERS, _OTHERS)
        self._features.labels(what, *labels).inc(times)
