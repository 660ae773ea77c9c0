"""vLLM in a process of its own: plain, with the plugin, or with vllm-lens; what it generates is timed from within."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import HOOKED, plugin_config

PER_LAYER = 2  # features that a program edits at each hooked layer
PROMPT = 32
TOKENS = 24
NAMED = 8  # features that are read by name
TOP = 5  # largest features that are read
PLUGINS = {"plain": "", "plugin": "sae_steer", "lens": "activations"}


def prompts(sequences: int) -> list[list[int]]:
    """The same for every engine."""
    return np.random.default_rng(0).integers(3, 16000, (sequences, PROMPT)).tolist()


@dataclass(frozen=True)
class Timed:
    """One generation: seconds in all, milliseconds of a decode step (median), and the completions' ids."""

    seconds: float
    step_ms: float | None
    tokens: list[list[int]]


class Child:
    """A process that generates what a line on its standard input names, and answers with one JSON line."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.about = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[7:])
        sys.exit("an engine died; its messages are above")

    def run(self, what: str) -> Timed:
        """Generates once."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return Timed(**self._answer())

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def engine(
    kind: str,
    folder: Path,
    *,
    threads: int,
    sequences: int,
    dtype: str,
    eager: bool = False,
    lens: Path | None = None,
    wide: bool = False,
    tokens: int = TOKENS,
) -> Child:
    """Starts one of the kinds ``plain``, ``plugin`` (``wide``: with the wide SAE) and ``lens``."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a step can be timed from within
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": PLUGINS[kind],
    }
    if kind == "lens":
        environment["PYTHONPATH"] = os.pathsep.join([str(lens), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, kind, str(folder), "--sequences", str(sequences), "--dtype", dtype]
    command += ["--tokens", str(tokens), *(["--eager"] if eager else []), *(["--wide"] if wide else [])]
    return Child(command, environment)


def serve(kind: str, folder: Path, *, sequences: int, dtype: str, eager: bool, wide: bool, tokens: int) -> None:
    """The other side of :class:`Child`."""
    import vllm
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {}
    if kind == "plugin":
        extra["additional_config"] = {"sae_steer": plugin_config(folder, max(32, sequences), wide=wide)}
    llm = LLM(
        str(folder / "model"),
        dtype=dtype,
        enforce_eager=eager,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=sequences,
        enable_prefix_caching=False,
        **extra,
    )
    steps: list[float] = []
    step = llm.llm_engine.step

    def timed() -> Any:
        start = time.perf_counter()
        outputs = step()
        steps.append(time.perf_counter() - start)
        return outputs

    llm.llm_engine.step = timed
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(sequences)]
    compiled = not llm.llm_engine.vllm_config.model_config.enforce_eager
    print("RESULT", json.dumps({"compiled": compiled, "vllm": vllm.__version__}), flush=True)
    for line in sys.stdin:
        extras = [extra_args(kind, line.strip(), number, sequences, folder) for number in range(sequences)]
        params = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
            for extra in extras
        ]
        steps.clear()
        start = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        check(kind, line.strip(), outputs)
        # The first steps hold prompts, and the last may hold less than the whole batch.
        step_ms = 1e3 * float(np.median(steps[4:-2]))
        found = [list(output.outputs[0].token_ids) for output in outputs]
        print("RESULT", json.dumps({"seconds": seconds, "step_ms": step_ms, "tokens": found}), flush=True)


def extra_args(kind: str, what: str, number: int, sequences: int, folder: Path) -> dict[str, Any] | None:
    """What one request asks: ``plain``, ``one`` program for all, ``each`` its own, ``half`` of them, ``vector``.

    Or it edits nothing, and reads of every token: ``named`` features, or the ``top`` ones of the wide SAE.
    """
    if what == "plain" or (what == "half" and number % 2):
        return None
    if what in ("named", "top"):
        asked = (
            {"sae": f"l{HOOKED[0]}", "features": list(range(NAMED))}
            if what == "named"
            else {"sae": "wide", "top_k": TOP}
        )
        return {"steering": {"readings": {**asked, "positions": "completion"}}}
    if what == "vector" and kind == "lens":
        from vllm_lens import SteeringVector

        rows = torch.stack([vector(folder, layer) for layer in HOOKED])
        return {"apply_steering_vectors": [SteeringVector(activations=rows, layer_indices=list(HOOKED))]}
    if what == "vector":
        edits: list[dict[str, Any]] = [
            {"site": f"resid_post.{layer}", "vector": f"v{layer}", "op": "add", "value": 1.0} for layer in HOOKED
        ]
    else:
        first = number * PER_LAYER if what == "each" else 0
        features = list(range(first, first + PER_LAYER))
        edits = [{"sae": f"l{layer}", "features": features, "op": "clamp", "value": 1.0} for layer in HOOKED]
    return {"steering": {"interventions": edits}}


def vector(folder: Path, layer: int) -> torch.Tensor:
    """``[D]`` the vector of a layer."""
    from safetensors.torch import load_file

    return load_file(folder / f"v{layer}.safetensors")["v"]


def check(kind: str, what: str, outputs: Any) -> None:
    """A case that did nothing must not be timed as one that did."""
    for number, output in enumerate(outputs):
        if kind == "plugin" and what != "plain" and not (what == "half" and number % 2):
            block = output.outputs[0].steering
            if what in ("named", "top"):
                [reading] = block["readings"]
                told = reading["values" if what == "named" else "top"]
                # The last token is never run through the model.
                assert len(told) == len(output.outputs[0].token_ids), len(told)
                assert all(len(entry) == (NAMED if what == "named" else TOP) for entry in told), reading
                continue
            applied = block["applied"]
            assert applied["fired"], applied
            assert len(applied["sites"]) == len(HOOKED), applied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=PLUGINS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--wide", action="store_true")
    options = vars(parser.parse_args())
    serve(options.pop("kind"), options.pop("folder"), **options)


if __name__ == "__main__":
    main()
