"""What one request took, and the numbers that a batch of them comes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Metric = Literal[
    "ttft_ms",
    "tpot_ms",
    "itl_p50_ms",
    "itl_p95_ms",
    "itl_p99_ms",
    "e2e_ms",
    "output_tokens_per_s",
    "requests_per_s",
]
METRICS: tuple[Metric, ...] = get_args(Metric)
WORDS: Mapping[Metric, str] = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_p50_ms": "inter-token latency, median",
    "itl_p95_ms": "inter-token latency, 95th percentile",
    "itl_p99_ms": "inter-token latency, 99th percentile",
    "e2e_ms": "end to end",
    "output_tokens_per_s": "output tokens per second",
    "requests_per_s": "requests per second",
}
_PERCENTILES: tuple[tuple[Metric, int], ...] = (("itl_p50_ms", 50), ("itl_p95_ms", 95), ("itl_p99_ms", 99))
MORE_IS_BETTER: frozenset[Metric] = frozenset({"output_tokens_per_s", "requests_per_s"})


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request.

    Args:
        ttft: Seconds from sending it to the first event with a choice.
        gaps: Seconds between each two such events.
        tokens: Completion tokens, as the server counts them.
    """

    ttft: float
    gaps: tuple[float, ...]
    tokens: int

    @property
    def latency(self) -> float:
        """Seconds from sending it to the last event."""
        return self.ttft + sum(self.gaps)


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests of one measurement.

    Args:
        samples: One for each.
        seconds: From the first request to the last answer.
    """

    samples: Sequence[Sample]
    seconds: float

    @property
    def tokens(self) -> int:
        """Completion tokens of all of them."""
        return sum(sample.tokens for sample in self.samples)

    def metrics(self) -> dict[Metric, float]:
        """Each metric, by ``vllm bench serve``'s definitions: latencies in milliseconds, medians over requests.

        A metric that the answers do not have, such as a gap where each was one token long, is left out.
        """
        samples = self.samples
        gaps = [gap for sample in samples for gap in sample.gaps]
        per_token = [(s.latency - s.ttft) / (s.tokens - 1) for s in samples if s.tokens > 1 and s.gaps]
        found: dict[Metric, float] = {
            "ttft_ms": 1e3 * float(np.median([sample.ttft for sample in samples])),
            "e2e_ms": 1e3 * float(np.median([sample.latency for sample in samples])),
            "output_tokens_per_s": self.tokens / self.seconds,
            "requests_per_s": len(samples) / self.seconds,
        }
        if per_token:
            found["tpot_ms"] = 1e3 * float(np.median(per_token))
        if gaps:
            for metric, percent in _PERCENTILES:
                found[metric] = 1e3 * float(np.percentile(gaps, percent))
        return {metric: found[metric] for metric in METRICS if metric in found}
