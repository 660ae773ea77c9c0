"""What it costs to have features read of every completion token: named ones, and the largest of a wide dictionary.

Plain vLLM and vLLM with the plugin live at once, each in a process of its own on the same model; the second generates
without readings, with named features read, and with the largest of 16,384 read. In each round every case generates
once, in a new order. A case's ratio is to the plugin's own engine without readings in the same round, and that one's to
plain vLLM. Beside it stands what no reading of a whole dictionary can do without: the product of the batch's rows with
the encoder, timed by itself with encoders in turn that no cache holds together, as a share of the decode step.

    python benchmarks/readings.py --out benchmarks/results/readings.json
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
from random_model import HOOKED, WIDE, write
from tqdm import tqdm
from vllm_engine import NAMED, TOP, Child, engine

import sae_steer
from sae_steer_bench.machine import cpu_name
from sae_steer_bench.stats import paired_ratio

TOKENS = 64
COPIES = 8
BOUND = 0.03
"""Of throughput, for named features."""
BOUND_TOP = 0.05
"""Of throughput, for the largest, beside the encoder product's share."""
CASES = {
    "plain vLLM": ("plain", "plain"),
    "plugin, nothing read": ("plugin", "plain"),
    f"{NAMED} named features": ("plugin", "named"),
    f"the {TOP} largest of {WIDE:,}": ("plugin", "top"),
}


class EncoderProduct:
    """The product of a decode step's rows with an encoder, its weights out of the cache."""

    def __init__(self, rows: int, width: int) -> None:
        self._x = torch.randn(rows, width)
        self._encoders = [torch.randn(WIDE, width) for _ in range(COPIES)]

    def ms(self) -> float:
        """Median time of one."""
        found = []
        for encoder in self._encoders:
            start = time.perf_counter()
            torch.nn.functional.linear(self._x, encoder)
            found.append(1e3 * (time.perf_counter() - start))
        return median(found)


def measure(
    engines: dict[str, Child], product: EncoderProduct, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Seconds of the batch and milliseconds of a decode step by case, and those of the product, round by round."""
    for kind, what in CASES.values():
        engines[kind].run(what)  # loads what is loaded once
    batch: dict[str, list[float]] = {name: [] for name in CASES}
    step: dict[str, list[float]] = {name: [] for name in CASES}
    products: list[float] = []
    order, shuffle = list(CASES), random.Random(0)
    deadline = time.monotonic() + seconds
    for number in tqdm(range(rounds), desc="rounds"):
        if number >= 5 and time.monotonic() > deadline:
            break
        shuffle.shuffle(order)
        for name in order:
            kind, what = CASES[name]
            timed = engines[kind].run(what)
            assert timed.step_ms is not None
            batch[name].append(timed.seconds)
            step[name].append(timed.step_ms)
        products.append(product.ms())
    return batch, step, products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/readings.json"))
    parser.add_argument("--rounds", type=int, default=60, help="the most rounds")
    parser.add_argument("--minutes", type=float, default=5, help="the most minutes of rounds, once five are done")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write(Path(folder))
        sizes = {"threads": options.threads, "sequences": options.sequences}
        engines = {
            kind: engine(kind, Path(folder), **sizes, dtype="float32", wide=kind == "plugin", tokens=TOKENS)
            for kind in tqdm(("plain", "plugin"), desc="starting engines")
        }
        batch, step, products = measure(
            engines, EncoderProduct(options.sequences, 768), options.rounds, 60 * options.minutes
        )
        versions = engines["plain"].about
        for child in engines.values():
            child.close()
    plain, idle, named, top = CASES
    share = median(products) / median(step[idle])
    bounds = {named: BOUND, top: share + BOUND_TOP}
    results = []
    for name in CASES:
        base = plain if name == idle else idle
        of_batch, of_step = paired_ratio(batch[name], batch[base]), paired_ratio(step[name], step[base])
        results.append(
            {
                "case": name,
                "base": base if name != plain else None,
                "tokens_per_s": options.sequences * TOKENS / median(batch[name]),
                "step_ms_median": median(step[name]),
                "batch_ratio": of_batch.model_dump(),
                "step_ratio": of_step.model_dump(),
                "bound": bounds.get(name),
            }
        )
    result = {
        "what": "readings of every completion token in vLLM, in rounds with the same engine without them",
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vllm": versions["vllm"],
            "sae_steer": sae_steer.__version__,
        },
        "parameters": parameters,
        "dtype": "float32",
        "sequences": options.sequences,
        "tokens": TOKENS,
        "hooked_layers": list(HOOKED),
        "rounds": len(products),
        "encoder_product_ms_median": median(products),
        "encoder_product_share": share,
        "cases": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
