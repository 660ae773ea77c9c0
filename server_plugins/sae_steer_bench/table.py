"""The result as a table in the terminal, and how it goes while it is made."""

from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sae_steer_bench.records import Baseline, CaseResult, Measurement, Plan, Ratio, Result
from sae_steer_bench.result import BASELINES, result_of
from sae_steer_bench.samples import Metric

SHOWN: tuple[tuple[Metric, str], ...] = (
    ("ttft_ms", "TTFT ms"),
    ("tpot_ms", "TPOT ms"),
    ("itl_p50_ms", "ITL p50"),
    ("itl_p95_ms", "p95"),
    ("itl_p99_ms", "p99"),
    ("e2e_ms", "E2E ms"),
    ("output_tokens_per_s", "tokens/s"),
)
HEADLINE: Metric = "tpot_ms"
"""What ratios are shown of where there is room for one."""


def tables(result: Result) -> Group:
    """A table for each load, and the cases that were not measured."""
    parts: list[Table | str] = [_table(result, load.name) for load in result.plan.loads]
    missing = [case for case in result.cases if case.status != "measured"]
    parts += [f"{case.status}: {case.label}: {case.reason}" for case in missing]
    return Group(*parts)


def _table(result: Result, load: str) -> Table:
    table = Table(title=f"{result.plan.server.model}, {load}, {result.rounds} rounds", title_justify="left")
    table.add_column("case")
    for _, title in SHOWN:
        table.add_column(title, justify="right")
    there = baselines(result)
    for baseline in there:
        table.add_column(f"TPOT / {baseline}", justify="right", no_wrap=True)
    for case in result.cases:
        metrics = case.loads.get(load)
        if metrics is not None:
            values = [f"{metrics[metric].value:.4g}" if metric in metrics else "" for metric, _ in SHOWN]
            table.add_row(case.label, *values, *(ratio_text(case, load, baseline) for baseline in there))
    return table


def baselines(result: Result) -> list[Baseline]:
    """The baselines that were measured."""
    measured = {case.key for case in result.cases if case.loads}
    return [baseline for baseline in BASELINES if baseline in measured]


def ratio(case: CaseResult, load: str, baseline: Baseline, metric: Metric = HEADLINE) -> Ratio | None:
    """A ratio of a case, where there is one."""
    found = case.loads.get(load, {}).get(metric)
    return found.ratios.get(baseline) if found is not None else None


def ratio_text(case: CaseResult, load: str, baseline: Baseline, metric: Metric = HEADLINE) -> str:
    """A ratio with its interval, in words."""
    found = ratio(case, load, baseline, metric)
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})" if found is not None else ""


def again_text(found: Ratio | None) -> str:
    """Where the median of another run would lie, in words."""
    if found is None or found.again_low is None or found.again_high is None:
        return ""
    return f"{found.again_low:.3f} to {found.again_high:.3f}"


class Display:
    """Shows how a run goes: on a terminal the table as it grows and a bar, else a line for each round.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[round]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TextColumn("{task.description}"), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=1, round="preparing")
        self._live = Live(self._progress, console=console, refresh_per_second=4, transient=True)
        self._plan: Plan | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with suppress(RuntimeError):
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, round_: int, place: int, total: int, label: str) -> None:
        """What is measured now."""
        name = f"round {round_}" if round_ else "warm-up"
        self._progress.update(self._task, completed=place, total=total, description=label, round=name)

    def plan(self, plan: Plan) -> None:
        """The plan is made."""
        self._plan = plan
        measured = sum(case.status == "measured" for case in plan.cases)
        self.say(
            f"{plan.server.host} at {plan.url or 'a port of its own'}, model {plan.server.model}: {measured} cases, "
            f"{plan.requests} requests each, up to {plan.rounds} rounds, about {plan.minutes:g} minutes"
        )

    def rounds(self, measurements: Sequence[Measurement]) -> None:
        """A round is complete."""
        assert self._plan is not None  # made before the first round
        number = measurements[-1].round
        if self._console.is_terminal:
            self._live.update(Group(tables(result_of(self._plan, measurements)), self._progress))
        else:
            self.say(f"round {number} done")
