"""Plans and measurements that no server was asked for."""

from typing import Any

from sae_steer_bench.records import CasePlan, LoadPlan, Machine, Measurement, Plan, Result, SaeFacts, ServerFacts
from sae_steer_bench.result import result_of

NASTY = "<script>alert('&')</script>"
"""A name that must not become markup."""


def plan(**changes: Any) -> Plan:
    """A plan of three cases and one that was refused."""
    sae = SaeFacts(id=NASTY, site="resid_post.1", features=8, fingerprint="sha256:0")
    fields: dict[str, Any] = {
        "command": f"sae-steer bench serve --model '{NASTY}'",
        "started": "2026-01-01T00:00:00+00:00",
        "launch": None,
        "url": "http://127.0.0.1:8000",
        "plain_url": None,
        "server": ServerFacts(
            host="vllm", version="1.0", model=NASTY, saes=[sae], limits={}, features=[], vocabulary=256, local=True
        ),
        "generator": "openai",
        "tokenizer": None,
        "loads": [LoadPlan(name="closed", concurrency=4)],
        "cases": [
            CasePlan(key="plain", label="no plugin", programs=0, edits=0, layers=0, status="measured"),
            CasePlan(key="idle", label="plugin, nobody steers", programs=0, edits=0, layers=0, status="measured"),
            CasePlan(key="one", label="one program", programs=1, edits=8, layers=1, status="measured"),
            CasePlan(
                key="features_64", label="64 features", programs=1, edits=64, layers=1, status="refused",
                reason=f"HTTP 400: {NASTY}",
            ),
        ],
        "value": 1.0,
        "prompt_tokens": 4,
        "output_tokens": 4,
        "requests": 4,
        "rounds": 5,
        "minutes": 1.0,
        "seed": 0,
        "machine": Machine(cpu="a CPU", cores=2, memory_gb=8.0, gpus=[], system="Linux"),
        "versions": {"python": "3"},
    }  # fmt: skip
    return Plan(**(fields | changes))


def measurement(round_: int, case: str, tpot: float, load: str = "closed") -> Measurement:
    """One measurement, of which the other metrics follow from one."""
    return Measurement(
        round=round_,
        load=load,
        case=case,
        at="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        requests=4,
        output_tokens=16,
        metrics={
            "ttft_ms": 3 * tpot,
            "tpot_ms": tpot,
            "itl_p50_ms": tpot,
            "itl_p95_ms": 2 * tpot,
            "itl_p99_ms": 3 * tpot,
            "e2e_ms": 6 * tpot,
            "output_tokens_per_s": 4e3 / tpot,
            "requests_per_s": 1e3 / tpot,
        },
    )


def result(factor: float = 1.25, rounds: int = 5, stopped: str | None = None, **changes: Any) -> Result:
    """A run on a machine that slows down from round to round, where steering takes ``factor`` times as long."""
    measurements = [
        measurement(number, case, 10.0 * number * cost)
        for number in range(1, rounds + 1)
        for case, cost in (("plain", 1.0), ("idle", 1.01), ("one", factor))
    ]
    return result_of(plan(**changes), measurements, stopped=stopped)
