"""What is counted of steering's blocks, with labels that no client can make grow, and the dashboard over it."""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from sae_steer_http.block_metrics import FEATURES, BlockMetrics
from sae_steer_server.metrics import Metrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def block(feature: int, *, fired: int = 3, dose: float = 0.3) -> dict[str, Any]:
    entry = {"sae": "res", "feature": feature, "fired": fired}
    return {
        "applied": {"tokens": 4, "features": [entry, {"vector": "v", "fired": 4}], "dose": {"max": dose}},
        "readings": [{"sae": "res", "summary": [{"feature": feature, "fired": 0.5, "tokens": 4}]}],
        "triggers": [{"action": "flag", "fired": 2}, {"action": "stop", "fired": 1}],
    }


def test_a_block_is_counted() -> None:
    registry = CollectorRegistry()
    metrics = BlockMetrics(registry)
    metrics.values(12)
    metrics.choice(block(7))
    metrics.choice({"applied": {"tokens": 0, "features": [], "dose": {"max": 0.0}}})

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("sae_steer_reading_values_total") == 12
    assert value("sae_steer_trigger_fired_total", action="flag") == 2
    assert value("sae_steer_trigger_fired_total", action="stop") == 1
    assert value("sae_steer_feature_fired_total", what="edited", sae="res", feature="7") == 3
    assert value("sae_steer_feature_fired_total", what="read", sae="res", feature="7") == 2
    assert value("sae_steer_dose_count") == 1, "an answer that nothing touched has no dose"
    assert value("sae_steer_dose_bucket", le="0.2") == 0
    assert value("sae_steer_dose_bucket", le="0.5") == 1


def test_features_beyond_the_first_are_counted_together() -> None:
    registry = CollectorRegistry()
    metrics = BlockMetrics(registry)
    for feature in range(3 * FEATURES):
        metrics.choice(block(feature))
    samples = [s for m in registry.collect() for s in m.samples if s.name == "sae_steer_feature_fired_total"]
    assert len(samples) == 2 * (FEATURES + 1)
    others = {"what": "edited", "sae": "other", "feature": "other"}
    assert registry.get_sample_value("sae_steer_feature_fired_total", others) == 2 * FEATURES * 3


def test_every_metric_of_the_dashboard_exists() -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    dashboard = json.loads(text)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    named = set(re.findall(r"\bsae_steer_[a-z_]+", text))
    rendered = Metrics().render().decode()
    there = set(re.findall(r"^# TYPE (\S+) ", rendered, re.MULTILINE))
    histograms = set(re.findall(r"^# TYPE (\S+) histogram$", rendered, re.MULTILINE))
    there |= {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}
    assert named <= there
    wanted = {"reading_values_total", "trigger_fired_total", "feature_fired_total", "dose_bucket"}
    assert {f"sae_steer_{name}" for name in wanted} <= named
