"""What a calibration costs beside the model's own forward passes and the encoder products over their tokens.

Texts are run in pairs, window by window: once as `sae-steer calibrate` does it (tokens, forward, encoder, histograms,
every token an observation) and once the bare minimum, the same batches through the model and one product with the
encoder; which goes first alternates. The result is the ratio of the sums, with a bootstrap interval over windows. Then
the whole command runs in a process of its own, for its time and its largest memory.

    python benchmarks/calibrate.py --out benchmarks/results/calibrate.json
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from recording import parser_of, write
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_steer import embedded
from sae_steer.calibration.data import Columns, Reader
from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.gather import save
from sae_steer.calibration.harvest import Harvester, Progress, Window, observe, pad_of, tapped, windows
from sae_steer.calibration.observe import Batch, Observing, Tokeniser, batches
from sae_steer.calibration.shards import Shards
from sae_steer.calibration.statistics import Statistics
from sae_steer.sae import open_sae

ROOT = Path(__file__).resolve().parents[1]
TOPICS = ("food", "music", "sea")
WINDOW = 32
"""Texts of a pair; the command sorts 256 together, and both sides have the same batches here."""
BOUND, MEMORY_BOUND_MB = 1.2, 2048


def write_texts(path: Path, tokens: int) -> Path:
    """Stories of the grammar that the embedded model was trained on, labelled by their first topic."""
    sys.path.insert(0, str(ROOT / "examples" / "embedded_model"))
    from corpus import Writer  # type: ignore[import-not-found]
    from grammar import Grammar  # type: ignore[import-not-found]

    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    held = 0
    with path.open("w", encoding="utf-8") as file:
        for document in Writer(Grammar.load(), 11).documents(10**6):
            text = " ".join(turn.text for turn in document)
            topic = next((s.topic for turn in document for s in turn.sentences if s.topic), "none")
            file.write(json.dumps({"text": text, "label": topic if topic in TOPICS else "other"}) + "\n")
            held += len(tokenizer(text)["input_ids"])
            if held >= tokens:
                return path
    raise AssertionError("endless")


def bare(harvester: Harvester, made: list[Batch], dense: torch.Tensor) -> float:
    """Seconds of the forward passes and the encoder products alone."""
    start = time.perf_counter()
    with tapped(harvester.model, [harvester.place]) as found, torch.inference_mode():
        for batch in made:
            observe(harvester.model, batch, found)[harvester.place] @ dense
    return time.perf_counter() - start


def calibrated(harvester: Harvester, window: Window, part: Statistics, progress: Progress) -> float:
    """Seconds of a window as the command runs it."""
    start = time.perf_counter()
    harvester.run(window, part, progress)
    return time.perf_counter() - start


def written(folder: Path, part: Statistics, window: Window, progress: Progress) -> float:
    """Seconds of what comes once in a shard: sorting what was gathered, writing it down, adding it to the total."""
    start = time.perf_counter()
    with Shards(folder, {}) as shards:
        save(shards, part, Statistics(part.features, part.labels), 0, window, progress)
    return time.perf_counter() - start


def pairs(data: Path, folder: Path) -> dict[str, Any]:
    """Times both sides on every window."""
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    sae = open_sae(embedded.SAE)
    encoder = Encoder.whole(sae)
    labels = sorted({*TOPICS, "other"})
    length = int(model.config.max_position_embeddings)
    tokeniser = Tokeniser(tokenizer, Observing("all", length), labels)
    assert sae.spec.site is not None
    harvester = Harvester(model, tokeniser, encoder, sae.spec.site.read)
    dense = sae.rows(range(encoder.features)).enc.T.contiguous()
    part, progress = Statistics(encoder.features, len(labels)), Progress()
    found = list(windows(Reader(data, Columns()), WINDOW))
    mine, minimum, tokens = [], [], 0
    for number, window in enumerate(tqdm([found[0], *found], unit="window")):
        made = list(batches(tokeniser(window.texts), harvester.batch_tokens, pad_of(model)))
        if number % 2:
            first = calibrated(harvester, window, part, progress)
            second = bare(harvester, made, dense)
        else:
            second = bare(harvester, made, dense)
            first = calibrated(harvester, window, part, progress)
        if number:  # the first window warms up, and comes again
            mine.append(first)
            minimum.append(second)
            tokens += sum(batch.tokens for batch in made)
    once = written(folder / "shards", part, found[-1], progress)
    rng = np.random.default_rng(0)
    a, b = np.array(mine) + once / len(mine), np.array(minimum)
    draws = rng.integers(len(a), size=(2000, len(a)))
    low, high = np.percentile(a[draws].sum(axis=1) / b[draws].sum(axis=1), [2.5, 97.5])
    return {
        "tokens": tokens,
        "windows": len(a),
        "calibrate_seconds": float(a.sum()),
        "of_which_once_a_shard": once,
        "forward_and_encoder_seconds": float(b.sum()),
        "ratio": float(a.sum() / b.sum()),
        "ratio_interval_95": [float(low), float(high)],
        "window_ratios": [round(float(r), 4) for r in a / b],
        "bound": BOUND,
        "within_bound": bool(high <= BOUND),
    }


def whole_command(data: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The command itself: its time and its largest memory."""
    options = ["--model", "demo", "--dtype", "float32", "--data", str(data), "--concept", "sea", "--tokens", "all"]
    program = f"import torch; torch.set_num_threads({threads}); import sae_steer_cli.cli as c; c.main()"
    command = [sys.executable, "-c", program, "calibrate", *options, "--out", str(folder / "sea"), "--quiet"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mb": peak, "bound_mb": MEMORY_BOUND_MB, "within_bound": peak < MEMORY_BOUND_MB}


def main() -> None:
    parser = parser_of(__doc__, "calibrate")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_texts(folder / "texts.jsonl", options.tokens)
        command = whole_command(data, folder, options.threads)
        paired = pairs(data, folder)
    write(
        options.out,
        "sae-steer calibrate on the embedded model, every token an observation, against the model's forward passes "
        "and the encoder products over the same batches, paired",
        threads=options.threads,
        versions={"transformers": transformers.__version__},
        features=open_sae(embedded.SAE).spec.n_features,
        paired=paired,
        whole_command=command,
    )
    print(json.dumps({"paired": {**paired, "window_ratios": "..."}, "whole_command": command}, indent=2))


if __name__ == "__main__":
    main()
