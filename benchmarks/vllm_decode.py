"""What steering costs a decode step of vLLM: without the plugin, idle, steered, and beside the peer vllm-lens.

Three engines live at once, each in a process of its own on the same model: plain vLLM, vLLM with the plugin, and (where
`--lens` says where it is installed) vLLM with vllm-lens, which switches compilation off for everybody. In each round
every engine generates in turn, in a new order, so that the machine's drift meets all alike; a round gives each case the
median time of its decode steps, and its ratio to plain vLLM in the same round. The result is the median of the ratios
over the rounds, with a bootstrap interval. Rounds end when all intervals are narrow enough, or at `--rounds`.

    pip install --no-deps --ignore-requires-python --target LENS vllm-lens==1.3.0 zstandard cloudpickle
    python benchmarks/vllm_decode.py --lens LENS --out benchmarks/results/vllm_decode.json
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attach_idle import cpu_name, interval, write_sae
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import sae_steer

HOOKED = (2, 5, 8, 11)
PER_LAYER = 2  # features that a program edits at each hooked layer
SEQUENCES = 16
PROMPT = 32
TOKENS = 24
BOUNDS = {"idle": 0.01, "one program": 0.05}
CASES = {
    "plain": ("plain", "plain"),
    "idle": ("plugin", "plain"),
    "one program": ("plugin", "one"),
    "16 programs": ("plugin", "sixteen"),
    "add a vector": ("plugin", "vector"),
    "vllm-lens, idle": ("lens", "plain"),
    "vllm-lens, add a vector": ("lens", "vector"),
}


def build(folder: Path) -> int:
    """Writes a random Llama of about 100 M parameters, four SAEs and a vector; returns the parameters."""
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
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    for layer in HOOKED:
        write_sae(folder / f"l{layer}", config.hidden_size, layer)
    save_file({"v": torch.randn(config.hidden_size)}, folder / "v.safetensors")
    return sum(p.numel() for p in model.parameters())


class Engine:
    """An engine in a process of its own."""

    def __init__(self, kind: str, folder: Path, options: argparse.Namespace) -> None:
        env = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a step can be timed from within
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(options.threads),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "VLLM_PLUGINS": {"plain": "", "plugin": "sae_steer", "lens": "activations"}[kind],
        }
        if kind == "lens":
            env["PYTHONPATH"] = os.pathsep.join([str(options.lens), env.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--engine", kind, "--folder", str(folder), "--dtype", options.dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.about = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[7:])
        sys.exit("an engine died; its messages are above")

    def run(self, what: str) -> float:
        """Milliseconds of a decode step: the median of one generation."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(kind: str, folder: Path, dtype: str) -> None:
    """The other side of :class:`Engine`: generates what standard input names, until it ends."""
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {}
    if kind == "plugin":
        config = {
            "saes": [{"name": f"l{layer}", "location": str(folder / f"l{layer}")} for layer in HOOKED],
            "vectors": [{"name": "v", "location": str(folder / "v.safetensors")}],
        }
        extra["additional_config"] = {"sae_steer": config}
    llm = LLM(
        str(folder / "model"),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=SEQUENCES,
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
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(3, 16000, PROMPT).tolist()} for _ in range(SEQUENCES)]
    print("RESULT", json.dumps({"enforce_eager": llm.model_config.enforce_eager}), flush=True)
    for line in sys.stdin:
        params = []
        for number in range(SEQUENCES):
            asked = _ask(kind, line.strip(), number, folder)
            params.append(
                SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=asked)
            )
        steps.clear()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        _check(kind, line.strip(), outputs)
        # The first steps hold prompts, and the last may hold less than the whole batch.
        print("RESULT", 1e3 * float(np.median(steps[3:-2])), flush=True)


def _ask(kind: str, what: str, number: int, folder: Path) -> dict[str, Any] | None:
    if what == "plain":
        return None
    if what == "vector" and kind == "lens":
        from vllm_lens import SteeringVector

        vector = _vector(folder)
        return {
            "apply_steering_vectors": [
                SteeringVector(activations=vector.expand(len(HOOKED), -1).clone(), layer_indices=list(HOOKED))
            ]
        }
    if what == "vector":
        edits: list[dict[str, Any]] = [
            {"site": f"resid_post.{layer}", "vector": "v", "op": "add", "value": 1.0} for layer in HOOKED
        ]
    else:
        first = number * PER_LAYER if what == "sixteen" else 0
        features = list(range(first, first + PER_LAYER))
        edits = [{"sae": f"l{layer}", "features": features, "op": "clamp", "value": 1.0} for layer in HOOKED]
    return {"steering": {"interventions": edits}}


def _vector(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "v.safetensors")["v"]


def _check(kind: str, what: str, outputs: Any) -> None:
    """A case that did nothing must not be timed as one that did."""
    if kind == "plugin" and what != "plain":
        for output in outputs:
            applied = output.outputs[0].steering["applied"]
            assert applied["fired"], applied
            assert len(applied["sites"]) == len(HOOKED), applied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vllm_decode.json"))
    parser.add_argument("--lens", type=Path, help="folder that vllm-lens was installed into; left out without it")
    parser.add_argument("--rounds", type=int, default=120, help="the most rounds")
    parser.add_argument("--minutes", type=float, default=60, help="the most minutes of rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--engine", choices=["plain", "plugin", "lens"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        serve(options.engine, options.folder, options.dtype)
        return
    kinds = ["plain", "plugin", *(["lens"] if options.lens else [])]
    cases = {name: case for name, case in CASES.items() if case[0] in kinds}
    with tempfile.TemporaryDirectory() as folder:
        parameters = build(Path(folder))
        engines = {kind: Engine(kind, Path(folder), options) for kind in tqdm(kinds, desc="starting engines")}
        times = measure(engines, cases, options.rounds, 60 * options.minutes)
        about = {kind: engine.about for kind, engine in engines.items()}
        for engine in engines.values():
            engine.close()
    rng = np.random.default_rng(0)
    plain = np.array(times["plain"])
    results = []
    for name, values in times.items():
        ratios = np.array(values) / plain
        low, high = interval(ratios, rng)
        results.append(
            {
                "case": name,
                "step_ms_median": float(np.median(values)),
                "ratio_median": float(np.median(ratios)),
                "ratio_interval_95": [low, high],
                "compiled": not about[cases[name][0]]["enforce_eager"],
                "bound": BOUNDS.get(name),
            }
        )
    import vllm

    result = {
        "what": "a decode step of vLLM, steered and not, in rounds with plain vLLM",
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "sae_steer": sae_steer.__version__,
            **({"vllm-lens": "1.3.0"} if options.lens else {}),
        },
        "parameters": parameters,
        "dtype": options.dtype,
        "sequences": SEQUENCES,
        "hooked_layers": list(HOOKED),
        "edited_features": PER_LAYER * len(HOOKED),
        "rounds": len(plain),
        "cases": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def measure(
    engines: dict[str, Engine], cases: dict[str, tuple[str, str]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Times every case once a round, in a new order each time."""
    for kind, what in cases.values():
        engines[kind].run(what)  # loads what is loaded once
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0)
    rng = np.random.default_rng(0)
    deadline = time.monotonic() + seconds
    for number in tqdm(range(rounds), desc="rounds"):
        if time.monotonic() > deadline:
            break
        shuffle.shuffle(order)
        for name in order:
            kind, what = cases[name]
            times[name].append(engines[kind].run(what))
        if number >= 30 and number % 10 == 0:
            plain = np.array(times["plain"])
            bounds = {name: interval(np.array(times[name]) / plain, rng) for name in BOUNDS}
            if all(high - low < BOUNDS[name] / 2 for name, (low, high) in bounds.items()):
                break
    return times


if __name__ == "__main__":
    main()
