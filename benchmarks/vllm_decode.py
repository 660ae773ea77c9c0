"""What steering costs a decode step of vLLM: without the plugin, idle, one program, and a program for each sequence.

Two engines live at once, each in a process of its own on the same model: plain vLLM, and vLLM with the plugin; both are
started some times, and each start has its share of the rounds. In each round every case generates once, in a new order,
so that the machine's drift meets all alike; a round gives each case the median time of its decode steps, timed within
the engine, and its ratio to plain vLLM in the same round. The result is the median of the ratios over the rounds, with
a bootstrap interval. Rounds end when all intervals are narrow enough, or at `--rounds`, or at `--minutes`.

    python benchmarks/vllm_decode.py --out benchmarks/results/vllm_decode.json
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from random_model import HOOKED, write
from recording import add_engine_options, in_starts, in_turns, parser_of
from recording import write as write_result
from vllm_engine import PER_LAYER, Child, engine

from sae_steer_bench.stats import paired_ratio

BOUNDS = {"idle": 0.01, "one program": 0.05, "programs": 0.10}


def cases(sequences: int) -> dict[str, tuple[str, str]]:
    """Engine and requests of each case."""
    return {
        "plain": ("plain", "plain"),
        "idle": ("plugin", "plain"),
        "one program": ("plugin", "one"),
        f"{sequences} programs": ("plugin", "each"),
        "every second steered": ("plugin", "half"),
        "add a vector": ("plugin", "vector"),
    }


def bound(case: str) -> float | None:
    """What a case is held against."""
    return BOUNDS.get(case, BOUNDS["programs"] if case.endswith(" programs") else None)


def steps(engines: dict[str, Child], todo: dict[str, tuple[str, str]]) -> dict[str, Callable[[], float]]:
    """Milliseconds of a decode step, by case; each has run once, so that what is loaded once is loaded."""

    def step(kind: str, what: str) -> float:
        found = engines[kind].run(what).step_ms
        assert found is not None
        return found

    for pair in todo.values():
        step(*pair)
    return {name: partial(step, *pair) for name, pair in todo.items()}


def narrow(times: Mapping[str, list[float]]) -> bool:
    """Whether each interval is half as wide as the bound that its case is held against."""
    found = {name: (paired_ratio(values, times["plain"]), bound(name)) for name, values in times.items()}
    return all(most is None or ratio.high - ratio.low < most / 2 for ratio, most in found.values())


def rows_of(
    todo: dict[str, tuple[str, str]], times: dict[str, list[float]], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each case, with its ratio to plain vLLM."""
    rows = []
    for name, values in times.items():
        ratio = paired_ratio(values, times["plain"])
        rows.append(
            {
                "case": name,
                "step_ms_median": median(values),
                "ratio_median": ratio.median,
                "ratio_interval_95": [ratio.low, ratio.high],
                "compiled": about[todo[name][0]]["compiled"],
                "bound": bound(name),
            }
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__, "vllm_decode")
    add_engine_options(parser, rounds=120, sequences=64)
    options = parser.parse_args()
    todo = cases(options.sequences)
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        parameters = write(Path(folder))

        def measure() -> dict[str, list[float]]:
            sizes = {"threads": options.threads, "sequences": options.sequences, "dtype": options.dtype}
            engines = {kind: engine(kind, Path(folder), **sizes) for kind in ("plain", "plugin")}
            about.update({kind: child.about for kind, child in engines.items()})
            share = {"rounds": ceil(options.rounds / options.starts), "minutes": options.minutes / options.starts}
            times = in_turns(steps(engines, todo), **share, enough=narrow)
            for child in engines.values():
                child.close()
            return times

        times = in_starts(options.starts, measure)
    results = rows_of(todo, times, about)
    write_result(
        options.out,
        "a decode step of vLLM, steered and not, in rounds with plain vLLM",
        threads=options.threads,
        versions={"vllm": about["plain"]["vllm"]},
        parameters=parameters,
        dtype=options.dtype,
        sequences=options.sequences,
        hooked_layers=list(HOOKED),
        edited_features=PER_LAYER * len(HOOKED),
        starts=options.starts,
        rounds=len(times["plain"]),
        cases=results,
    )
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
