"""What an attached SAE costs a model that nobody steers: the forward pass of 100 M parameters, four hooked layers.

One model is measured in turns with and without the hooks of `sae_steer.attach`, so that the machine's drift meets both
sides alike. A pair is one pass of each, in alternating order; the result is the median of the pairs' ratios, with a
bootstrap interval. The run goes on until the interval is half as wide as the bound it is held against, or pairs end.

    python benchmarks/attach_idle.py --out benchmarks/results/attach_idle.json
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from random_model import HOOKED, build, write_sae
from recording import parser_of, write
from tqdm import tqdm
from transformers import PreTrainedModel

import sae_steer
from sae_steer_bench.stats import paired_ratio

BOUND = 0.01


def seconds(pass_: Callable[[], object]) -> float:
    start = time.perf_counter()
    pass_()
    return time.perf_counter() - start


@torch.no_grad()
def measure(model: PreTrainedModel, saes: dict[str, Path], tokens: torch.Tensor, pairs: int) -> dict[str, Any]:
    """Times pairs of passes, with and without hooks."""

    def forward() -> object:
        return model(input_ids=tokens, use_cache=False).logits

    def attached() -> float:
        with sae_steer.attach(model, saes=saes):
            return seconds(forward)

    for _ in range(5):
        forward()
    plain_logits = forward()
    with sae_steer.attach(model, saes=saes):
        assert torch.equal(forward(), plain_logits), "an idle attachment changed the logits"
    plain: list[float] = []
    hooked: list[float] = []
    for number in tqdm(range(pairs), desc=f"{tokens.shape[1]} tokens", unit="pair"):
        if number % 2:
            hooked.append(attached())
            plain.append(seconds(forward))
        else:
            plain.append(seconds(forward))
            hooked.append(attached())
        if number >= 60 and number % 20 == 0:
            bounds = paired_ratio(hooked, plain)
            if bounds.high - bounds.low < BOUND / 2:
                break
    ratio = paired_ratio(hooked, plain)
    return {
        "tokens": tokens.shape[1],
        "pairs": len(plain),
        "plain_ms_median": 1e3 * median(plain),
        "attached_ms_median": 1e3 * median(hooked),
        "ratio_median": ratio.median,
        "ratio_interval_95": [ratio.low, ratio.high],
        "interval_narrower_than_bound": ratio.high - ratio.low < BOUND,
        "cost_below_bound": ratio.high < 1 + BOUND,
    }


def main() -> None:
    parser = parser_of(__doc__, "attach_idle")
    parser.add_argument("--pairs", type=int, default=600, help="the most pairs to time for each length")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    with tempfile.TemporaryDirectory() as folder:
        saes = {f"l{n}": write_sae(Path(folder) / f"l{n}", model.config.hidden_size, n) for n in HOOKED}
        runs = [
            measure(model, saes, torch.randint(0, model.config.vocab_size, (1, length)), options.pairs)
            for length in (1, 64)
        ]
    write(
        options.out,
        "forward pass with attached, idle edit layers against the bare model, paired",
        threads=options.threads,
        versions={"transformers": transformers.__version__},
        parameters=sum(p.numel() for p in model.parameters()),
        hooked_layers=list(HOOKED),
        bound=BOUND,
        runs=runs,
    )
    print(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
