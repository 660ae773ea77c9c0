"""What steering costs a decode step of vLLM: without the plugin, idle, one program, and a program for each sequence.

Two engines live at once, each in a process of its own on the same model: plain vLLM, and vLLM with the plugin. In each
round every case generates once, in a new order, so that the machine's drift meets all alike; a round gives each case
the median time of its decode steps, timed within the engine, and its ratio to plain vLLM in the same round. The result
is the median of the ratios over the rounds, with a bootstrap interval. Rounds end when all intervals are narrow
enough, or at `--rounds`, or at `--minutes`.

    python benchmarks/vllm_decode.py --out benchmarks/results/vllm_decode.json
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from random_model import HOOKED, write
from tqdm import tqdm
from vllm_engine import PER_LAYER, Child, engine

import sae_steer
from sae_steer_bench.machine import cpu_name
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


def measure(
    engines: dict[str, Child], todo: dict[str, tuple[str, str]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Times every case once a round, in a new order each time."""
    for kind, what in todo.values():
        engines[kind].run(what)  # loads what is loaded once
    times: dict[str, list[float]] = {name: [] for name in todo}
    order = list(todo)
    shuffle = random.Random(0)
    deadline = time.monotonic() + seconds
    for number in tqdm(range(rounds), desc="rounds"):
        if number >= 5 and time.monotonic() > deadline:
            break
        shuffle.shuffle(order)
        for name in order:
            kind, what = todo[name]
            step = engines[kind].run(what).step_ms
            assert step is not None
            times[name].append(step)
        if number >= 30 and number % 10 == 0 and narrow(times):
            break
    return times


def narrow(times: dict[str, list[float]]) -> bool:
    """Whether each interval is half as wide as the bound that its case is held against."""
    found = {name: (paired_ratio(values, times["plain"]), bound(name)) for name, values in times.items()}
    return all(most is None or ratio.high - ratio.low < most / 2 for ratio, most in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vllm_decode.json"))
    parser.add_argument("--rounds", type=int, default=120, help="the most rounds")
    parser.add_argument("--minutes", type=float, default=60, help="the most minutes of rounds, once five are done")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    todo = cases(options.sequences)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write(Path(folder))
        kinds = tqdm(("plain", "plugin"), desc="starting engines")
        sizes = {"threads": options.threads, "sequences": options.sequences, "dtype": options.dtype}
        engines = {kind: engine(kind, Path(folder), **sizes) for kind in kinds}
        times = measure(engines, todo, options.rounds, 60 * options.minutes)
        about = {kind: child.about for kind, child in engines.items()}
        for child in engines.values():
            child.close()
    results = []
    for name, values in times.items():
        ratio = paired_ratio(values, times["plain"])
        results.append(
            {
                "case": name,
                "step_ms_median": median(values),
                "ratio_median": ratio.median,
                "ratio_interval_95": [ratio.low, ratio.high],
                "compiled": about[todo[name][0]]["compiled"],
                "bound": bound(name),
            }
        )
    result = {
        "what": "a decode step of vLLM, steered and not, in rounds with plain vLLM",
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vllm": about["plain"]["vllm"],
            "sae_steer": sae_steer.__version__,
        },
        "parameters": parameters,
        "dtype": options.dtype,
        "sequences": options.sequences,
        "hooked_layers": list(HOOKED),
        "edited_features": PER_LAYER * len(HOOKED),
        "rounds": len(times["plain"]),
        "cases": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
