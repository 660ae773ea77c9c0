"""What it costs to have features read of every completion token: named ones, and the largest of a wide dictionary.

Plain vLLM and vLLM with the plugin live at once, each in a process of its own on the same model; both are started some
times, and each start has its share of the rounds. The second generates without readings, with named features read, and
with the largest of 16,384 read. In each round every case generates once, in a new order. A case's ratio is to the
plugin's own engine without readings in the same round, and that one's to plain vLLM. Beside it stands what no reading
of a whole dictionary can do without: the product of the batch's rows with the encoder, timed by itself with encoders in
turn that no cache holds together, by torch and by the plugin's own loop. The share that counts is that of the fastest.

    python benchmarks/readings.py --out benchmarks/results/readings.json
"""

import json
import tempfile
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_model import HOOKED, WIDE, WIDTH, write
from recording import add_engine_options, in_starts, in_turns, parser_of
from recording import write as write_result
from vllm_engine import NAMED, TOP, Child, Timed, engine

from sae_steer_bench.stats import paired_ratio
from sae_steer_kernels.topk_readout.numba_impl import products

TOKENS = 64
COPIES = 8
BOUND = 0.03
"""Of throughput, for named features."""
BOUND_TOP = 0.05
"""Of throughput, for the largest, beside the encoder product's share."""
PLAIN, IDLE = "plain vLLM", "plugin, nothing read"
NAMES, LARGEST = f"{NAMED} named features", f"the {TOP} largest of {WIDE:,}"
CASES = {
    PLAIN: ("plain", "plain"),
    IDLE: ("plugin", "plain"),
    NAMES: ("plugin", "named"),
    LARGEST: ("plugin", "top"),
}


class EncoderProduct:
    """The product of a decode step's rows with an encoder, its weights out of the cache.

    Args:
        rows: Of the step.
        width: Of the model.
        multiply: Takes an encoder ``[F, D]`` and rows ``[T, D]``.
    """

    def __init__(self, rows: int, width: int, multiply: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        self._x = torch.randn(rows, width)
        self._encoders = [torch.randn(WIDE, width) for _ in range(COPIES)]
        self._multiply = multiply

    def __call__(self) -> Timed:
        """The median time of one."""
        found = []
        for encoder in self._encoders:
            start = time.perf_counter()
            self._multiply(encoder, self._x)
            found.append(1e3 * (time.perf_counter() - start))
        return Timed(0.0, median(found), [])


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "torch, x @ enc.T": lambda encoder, x: torch.nn.functional.linear(x, encoder),
    "torch, enc @ x.T": lambda encoder, x: encoder @ x.T,
    "sae-steer": products,
}


def step_ms(timed: list[Timed]) -> list[float]:
    """Milliseconds of the decode steps."""
    return [each.step_ms for each in timed if each.step_ms is not None]


def rows_of(found: dict[str, list[Timed]], bounds: dict[str, float], tokens: int) -> list[dict[str, Any]]:
    """A row for each case, with its ratios of the batch's time and of a decode step's."""
    rows: list[dict[str, Any]] = []
    for name in CASES:
        base = PLAIN if name == IDLE else IDLE
        batch, of = ([each.seconds for each in found[key]] for key in (name, base))
        rows.append(
            {
                "case": name,
                "base": base if name != PLAIN else None,
                "tokens_per_s": tokens / median(batch),
                "step_ms_median": median(step_ms(found[name])),
                "batch_ratio": paired_ratio(batch, of).model_dump(),
                "step_ratio": paired_ratio(step_ms(found[name]), step_ms(found[base])).model_dump(),
                "bound": bounds.get(name),
            }
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__, "readings")
    add_engine_options(parser, rounds=60, sequences=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write(Path(folder))
        sizes = {"threads": options.threads, "sequences": options.sequences, "dtype": options.dtype}
        about: dict[str, Any] = {}

        def measure() -> dict[str, list[Timed]]:
            engines: dict[str, Child] = {
                kind: engine(kind, Path(folder), **sizes, wide=kind == "plugin", tokens=TOKENS)
                for kind in ("plain", "plugin")
            }
            about.update(engines["plain"].about)
            for kind, what in CASES.values():
                engines[kind].run(what)  # loads what is loaded once
            calls = {name: lambda kind=kind, what=what: engines[kind].run(what) for name, (kind, what) in CASES.items()}
            calls |= {name: EncoderProduct(options.sequences, WIDTH, multiply) for name, multiply in PRODUCTS.items()}
            share = {"rounds": ceil(options.rounds / options.starts), "minutes": options.minutes / options.starts}
            found = in_turns(calls, **share)
            for child in engines.values():
                child.close()
            return found

        found = in_starts(options.starts, measure)
    taken = {name: median(step_ms(found[name])) for name in PRODUCTS}
    share = min(taken.values()) / median(step_ms(found[IDLE]))
    rows = rows_of(found, {NAMES: BOUND, LARGEST: share + BOUND_TOP}, options.sequences * TOKENS)
    write_result(
        options.out,
        "readings of every completion token in vLLM, in rounds with the same engine without them",
        threads=options.threads,
        versions={"vllm": about["vllm"]},
        parameters=parameters,
        dtype=options.dtype,
        sequences=options.sequences,
        tokens=TOKENS,
        hooked_layers=list(HOOKED),
        starts=options.starts,
        rounds=len(found[IDLE]),
        encoder_products_ms_median=taken,
        encoder_product_share=share,
        cases=rows,
    )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
