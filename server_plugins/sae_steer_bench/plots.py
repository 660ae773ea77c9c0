"""Plots of a result, as PNG."""

from collections.abc import Callable, Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sae_steer_bench.records import Baseline, CaseResult, Interval, Result
from sae_steer_bench.samples import MORE_IS_BETTER, WORDS, Metric
from sae_steer_bench.table import baselines, ratio

_COLOUR = "#1f5fa8"
_FAINT = "#9dbbdc"
_PERCENTILES: tuple[tuple[Metric, str], ...] = (("itl_p50_ms", "o"), ("itl_p95_ms", "|"), ("itl_p99_ms", "x"))
_DPI = 120


def plots(result: Result) -> dict[str, bytes]:
    """PNG images by file name: for each load, ratios with intervals, latencies between tokens, ratios by round."""
    found: dict[str, bytes] = {}
    there = baselines(result)
    for load in result.plan.loads:
        name = load.name.replace(" ", "-").replace("/", "-per-")
        cases = [case for case in result.cases if load.name in case.loads]
        if not cases:
            continue
        for baseline in there[:1]:
            for metric in ("tpot_ms", "ttft_ms", "output_tokens_per_s"):
                rows = ratios_of(result, load.name, baseline, metric)
                if rows:
                    better = "more" if metric in MORE_IS_BETTER else "less"
                    label = f"{WORDS[metric]}, ratio to {_NAMES[baseline]} ({better} is better)"
                    found[f"{name}-{metric.removesuffix('_ms')}-ratio.png"] = forest(rows, label)
            by_round = _rounds(result, cases, load.name, baseline)
            if by_round is not None:
                found[f"{name}-rounds.png"] = _png(8, by_round)
        if any("itl_p50_ms" in case.loads[load.name] for case in cases):
            found[f"{name}-itl.png"] = _png(len(cases), _gaps(cases, load.name))
    return found


def forest(rows: Sequence[tuple[str, Interval]], label: str, *, source: str | None = None) -> bytes:
    """A PNG of ratios with their intervals, one under the other.

    Args:
        rows: What each is of, and the ratio.
        label: Of the axis.
        source: Put into the file, to tell from what it was drawn.
    """

    def draw(axes: Axes) -> None:
        medians = [found.median for _, found in rows]
        reach = [
            [max(0.0, found.median - found.low) for _, found in rows],
            [max(0.0, found.high - found.median) for _, found in rows],
        ]
        numbers = range(len(rows))
        axes.errorbar(medians, numbers, xerr=reach, fmt="o", color=_COLOUR, ecolor=_FAINT, elinewidth=3, markersize=5)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(numbers, [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(label)

    return _png(len(rows), draw, source)


def ratios_of(result: Result, load: str, baseline: Baseline, metric: Metric) -> list[tuple[str, Interval]]:
    """The cases that have a ratio, and it."""
    return [(case.label, found) for case in result.cases if (found := ratio(case, load, baseline, metric)) is not None]


_NAMES: dict[Baseline, str] = {"plain": "no plugin", "idle": "the idle plugin"}


def _rounds(result: Result, cases: list[CaseResult], load: str, baseline: Baseline) -> Callable[[Axes], None] | None:
    values = {
        (each.case, each.round): each.metrics["tpot_ms"]
        for each in result.measurements
        if each.load == load and "tpot_ms" in each.metrics
    }
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        numbers = [n for (key, n) in values if key == case.key and (baseline, n) in values]
        if case.key != baseline and numbers:
            lines[case.label] = [(n, values[case.key, n] / values[baseline, n]) for n in numbers]
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=0.8, label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xlabel("round")
        axes.set_ylabel(f"TPOT, ratio to {_NAMES[baseline]}")
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    return draw


def _gaps(cases: list[CaseResult], load: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for metric, marker in _PERCENTILES:
            rows = [row for row, case in enumerate(cases) if metric in case.loads[load]]
            points = [cases[row].loads[load][metric].value for row in rows]
            axes.scatter(points, rows, marker=marker, color=_COLOUR, label=WORDS[metric].rpartition(", ")[2])
        axes.set_yticks(range(len(cases)), [case.label for case in cases])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("inter-token latency, ms")
        axes.legend(fontsize=7, frameon=False)

    return draw


def _png(rows: int, draw: Callable[[Axes], None], source: str | None = None) -> bytes:
    # No pyplot: it keeps figures and chooses a display.
    figure = Figure(figsize=(9, 1.2 + 0.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = BytesIO()
    figure.savefig(file, dpi=_DPI, metadata={"Software": None, "Source": source})
    return file.getvalue()
