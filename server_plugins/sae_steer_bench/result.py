"""From measurements to the result: medians over rounds, and ratios to the baselines of the same rounds."""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from sae_steer_bench.records import (
    Baseline,
    CasePlan,
    CaseResult,
    Measurement,
    MetricResult,
    Plan,
    Ratio,
    Result,
)
from sae_steer_bench.samples import METRICS, Metric
from sae_steer_bench.stats import agree, repeatable_ratio

BASELINES: tuple[Baseline, ...] = get_args(Baseline)


def result_of(plan: Plan, measurements: Sequence[Measurement], *, stopped: str | None = None) -> Result:
    """The result of the complete rounds of a run.

    Args:
        plan: The run's plan.
        measurements: Those of complete rounds.
        stopped: What ended the run early.
    """
    return Result(
        plan=plan,
        rounds=len({each.round for each in measurements}),
        stopped=stopped,
        cases=[_case(plan, case, measurements) for case in plan.cases],
        measurements=list(measurements),
    )


def _case(plan: Plan, case: CasePlan, measurements: Sequence[Measurement]) -> CaseResult:
    loads: dict[str, dict[Metric, MetricResult]] = {}
    for load in plan.loads:
        here = [each for each in measurements if each.load == load.name]
        metrics: dict[Metric, MetricResult] = {}
        for metric in METRICS:
            found = _metric(case.key, metric, here, plan.seed)
            if found is not None:
                metrics[metric] = found
        if metrics:
            loads[load.name] = metrics
    return CaseResult(**case.model_dump(), loads=loads)


def _metric(case: str, metric: Metric, here: Sequence[Measurement], seed: int) -> MetricResult | None:
    own = _by_round(case, metric, here)
    if not own:
        return None
    ratios: dict[Baseline, Ratio] = {}
    for baseline in BASELINES:
        base = _by_round(baseline, metric, here)
        rounds = [number for number in own if number in base]
        if baseline != case and rounds:
            ratios[baseline] = repeatable_ratio([own[n] for n in rounds], [base[n] for n in rounds], seed=seed)
    return MetricResult(value=float(np.median(list(own.values()))), ratios=ratios)


def _by_round(case: str, metric: Metric, here: Sequence[Measurement]) -> dict[int, float]:
    return {each.round: each.metrics[metric] for each in here if each.case == case and metric in each.metrics}


def compare(one: Result, other: Result, metric: Metric) -> list[tuple[str, str, Baseline, Ratio, Ratio, bool]]:
    """Load, case, baseline, both ratios, and whether each median lies where the other run expects it."""
    found: list[tuple[str, str, Baseline, Ratio, Ratio, bool]] = []
    others = {case.key: case for case in other.cases}
    for case in one.cases:
        for load, metrics in case.loads.items():
            twin = others[case.key].loads.get(load, {}) if case.key in others else {}
            if metric not in metrics or metric not in twin:
                continue
            for baseline, ratio in metrics[metric].ratios.items():
                second = twin[metric].ratios.get(baseline)
                if second is not None:
                    found.append((load, case.label, baseline, ratio, second, agree(ratio, second)))
    return found


def differences(one: Result, other: Result) -> list[str]:
    """What two runs did not have in common, so that ratios may differ for it; versions of packages are not told."""
    first, second = _subject(one.plan), _subject(other.plan)
    found = [f"{name} was {first[name]} and {second[name]}" for name in first if first[name] != second[name]]
    loads = [{load.name for load in run.plan.loads} for run in (one, other)]
    cases = [{case.key for case in run.cases if case.loads} for run in (one, other)]
    for what, (mine, theirs) in (("load", loads), ("case", cases)):
        found += [f"only one of them has the {what} {name!r}" for name in sorted(mine ^ theirs)]
    return found


def _subject(plan: Plan) -> dict[str, object]:
    return {
        "the host": plan.server.host,
        "the model": plan.server.model,
        "the list of SAEs": [sae.fingerprint for sae in plan.server.saes],
        "concurrency": plan.loads[0].concurrency,
        "prompt_tokens": plan.prompt_tokens,
        "output_tokens": plan.output_tokens,
        "generator": plan.generator,
        "the processor": plan.machine.cpu,
        "the list of GPUs": plan.machine.gpus,
    }
