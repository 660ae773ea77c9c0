"""The metrics of a batch, computed by hand."""

import pytest

from sae_steer_bench.samples import Batch, Sample


def test_metrics_by_hand() -> None:
    batch = Batch([Sample(0.5, (0.1, 0.3), 3), Sample(0.7, (0.2,), 5)], seconds=2.0)
    found = batch.metrics()
    assert found == {
        "ttft_ms": pytest.approx(600),
        "tpot_ms": pytest.approx(1e3 * (0.4 / 2 + 0.2 / 4) / 2),  # by tokens, not by events
        "itl_p50_ms": pytest.approx(200),
        "itl_p95_ms": pytest.approx(290),
        "itl_p99_ms": pytest.approx(298),
        "e2e_ms": pytest.approx(900),
        "output_tokens_per_s": pytest.approx(4),
        "requests_per_s": pytest.approx(1),
    }


def test_one_token_has_no_time_per_token() -> None:
    found = Batch([Sample(0.5, (), 1)], seconds=1.0).metrics()
    assert set(found) == {"ttft_ms", "e2e_ms", "output_tokens_per_s", "requests_per_s"}
