"""What an attached SAE costs a model that nobody steers: the forward pass of 100 M parameters, four hooked layers.

One model is measured in turns with and without the hooks of `sae_steer.attach`, so that the machine's drift meets both
sides alike. A pair is one pass of each, in alternating order; the result is the median of the pairs' ratios, with a
bootstrap interval. The run goes on until the interval is half as wide as the bound it is held against, or pairs end.

    python benchmarks/attach_idle.py --out benchmarks/results/attach_idle.json
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sae_steer

HOOKED = (2, 5, 8, 11)
FEATURES = 64
BOUND = 0.01


def build() -> PreTrainedModel:
    """A random Llama of about 100 M parameters."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write_sae(folder: Path, width: int, layer: int) -> Path:
    """A random JumpReLU SAE in SAELens' layout."""
    folder.mkdir()
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, width), dim=1)
    save_file(
        {
            "W_enc": directions.T.contiguous(),
            "W_dec": directions,
            "b_enc": torch.zeros(FEATURES),
            "b_dec": torch.zeros(width),
            "threshold": torch.full((FEATURES,), 0.1),
        },
        folder / "sae_weights.safetensors",
    )
    config = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": FEATURES,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def seconds(pass_: Callable[[], object]) -> float:
    start = time.perf_counter()
    pass_()
    return time.perf_counter() - start


def interval(ratios: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    medians = np.median(rng.choice(ratios, size=(2000, ratios.size)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


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
    rng = np.random.default_rng(0)
    plain, hooked = [], []
    bounds = (-math.inf, math.inf)
    for number in tqdm(range(pairs), desc=f"{tokens.shape[1]} tokens", unit="pair"):
        if number % 2:
            hooked.append(attached())
            plain.append(seconds(forward))
        else:
            plain.append(seconds(forward))
            hooked.append(attached())
        if number >= 60 and number % 20 == 0:
            bounds = interval(np.array(hooked) / np.array(plain), rng)
            if bounds[1] - bounds[0] < BOUND / 2:
                break
    ratios = np.array(hooked) / np.array(plain)
    low, high = interval(ratios, rng)
    return {
        "tokens": tokens.shape[1],
        "pairs": len(ratios),
        "plain_ms_median": 1e3 * float(np.median(plain)),
        "attached_ms_median": 1e3 * float(np.median(hooked)),
        "ratio_median": float(np.median(ratios)),
        "ratio_interval_95": [low, high],
        "interval_narrower_than_bound": high - low < BOUND,
        "cost_below_bound": high < 1 + BOUND,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attach_idle.json"))
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
    result = {
        "what": "forward pass with attached, idle edit layers against the bare model, paired",
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sae_steer": sae_steer.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "hooked_layers": list(HOOKED),
        "bound": BOUND,
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["runs"], indent=2))


if __name__ == "__main__":
    main()
