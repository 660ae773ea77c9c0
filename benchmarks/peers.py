"""The one operation that all can do, add a vector at four layers, done by each of them on the same model and prompts.

Plain vLLM and vLLM with the plugin, both compiled and eager; vllm-lens 1.3.0, which makes every server eager;
transformers with hooks on SAEs that SAELens loads; and the embedded server. All are there at once, each in a process
of its own (SAELens and vllm-lens with what they are installed with), and take turns in rounds of a new order. What is
timed is the whole batch: prompts and completions. Before that, every peer must have generated the tokens that the
plugin's eager engine generates, or the run ends: in float32 they all do the same thing.

    make peers    # installs the two beside, and runs this
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

import transformers
from random_model import HOOKED, plugin_config, write
from recording import add_engine_options, in_turns, parser_of
from recording import write as write_result
from tqdm import tqdm
from vllm_engine import PROMPT, TOKENS, Child, Timed, engine, prompts

from sae_steer_bench.launch import Launched, Port
from sae_steer_bench.stats import paired_ratio

LEAST = 0.9
"""Share of tokens that must be equal: two near-equal logits may change places where sums run in another order."""
WHY = (
    "An eager step calls every operation from Python, and a compiled one calls a few fused ones; so the same hook "
    "costs a larger share of a compiled step, and a tool that forces eager mode costs every request that difference, "
    "steered or not."
)


class Embedded:
    """The embedded server: its completions over HTTP, all of a batch at once."""

    def __init__(self, stack: ExitStack, folder: Path, sequences: int, threads: int, dtype: str) -> None:
        from openai import OpenAI

        port = Port(None)
        config: dict[str, Any] = plugin_config(folder)
        words = [sys.executable, "-m", "sae_steer_cli", "serve", str(folder / "model"), "--served-model-name", "m"]
        words += ["--dtype", dtype, "--max-running", str(sequences), "--max-model-len", "256", "--log-level", "error"]
        for sae in config["saes"]:
            words += ["--sae", f"{sae['name']}={sae['location']}"]
        for vector in config["vectors"]:
            words += ["--vector", f"{vector['name']}={vector['location']}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        server = Launched(
            [*words, "--port", str(port.number)], environment, port=port, log=folder / "embedded.log", timeout=300
        )
        stack.enter_context(server)
        self._client = stack.enter_context(OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300))
        self._prompts = prompts(sequences)
        self.about: dict[str, Any] = {"compiled": False}

    def run(self, what: str) -> Timed:
        """Generates once. The texts are words ``w<id>``, which are the tokens."""
        edits = [{"site": f"resid_post.{n}", "vector": f"v{n}", "op": "add", "value": 1.0} for n in HOOKED]
        extra: dict[str, Any] = {"ignore_eos": True}
        if what == "vector":
            extra["steering"] = {"interventions": edits}
        start = time.perf_counter()
        reply = self._client.completions.create(
            model="m", prompt=self._prompts, max_tokens=TOKENS, temperature=0, extra_body=extra
        )
        seconds = time.perf_counter() - start
        tokens = [[int(word[1:]) for word in choice.text.split()] for choice in reply.choices]
        return Timed(seconds, None, tokens)


def start(options: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Child | Embedded]:
    """Every peer that the options name an installation of."""
    sizes = {"threads": options.threads, "sequences": options.sequences, "dtype": options.dtype}
    starts: dict[str, Callable[[], Child | Embedded]] = {
        "plain vLLM, compiled": lambda: engine("plain", folder, **sizes),
        "plain vLLM, eager": lambda: engine("plain", folder, eager=True, **sizes),
        "sae-steer, compiled": lambda: engine("plugin", folder, **sizes),
        "sae-steer, eager": lambda: engine("plugin", folder, eager=True, **sizes),
    }
    if options.lens:
        starts["vllm-lens"] = lambda: engine("lens", folder, lens=options.lens, **sizes)
    if options.saelens:
        words = [options.saelens, str(Path(__file__).with_name("saelens_engine.py")), str(folder)]
        words += ["--layers", json.dumps(HOOKED), "--prompts", json.dumps(prompts(options.sequences))]
        words += ["--tokens", str(TOKENS), "--dtype", options.dtype]
        environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        starts["SAELens on transformers"] = lambda: Child(words, environment)
    starts["sae-steer, embedded"] = lambda: Embedded(stack, folder, **sizes)
    peers: dict[str, Child | Embedded] = {}
    for name in tqdm(starts, desc="starting peers"):
        peer = starts[name]()
        peers[name] = peer
        if isinstance(peer, Child):
            stack.callback(peer.close)
    return peers


def todo_of(peers: dict[str, Child | Embedded]) -> list[tuple[str, str]]:
    """What each peer does: plain vLLM no more than plain requests, the others both."""
    return [
        (name, what) for name in peers for what in ("plain", "vector") if "plain vLLM" not in name or what == "plain"
    ]


def same_tokens(peers: dict[str, Child | Embedded], todo: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Share of tokens that each has in common with the plugin's eager engine; also the warm-up."""
    found = {pair: peers[pair[0]].run(pair[1]).tokens for pair in tqdm(todo, desc="comparing tokens")}
    shares: dict[tuple[str, str], float] = {}
    for name, what in todo:
        expected = found["sae-steer, eager", what]
        pairs = [(a, b) for mine, theirs in zip(found[name, what], expected, strict=True)
                 for a, b in zip(mine, theirs, strict=True)]  # fmt: skip
        shares[name, what] = sum(a == b for a, b in pairs) / len(pairs)
    wrong = [(*pair, share) for pair, share in shares.items() if share < LEAST]
    if wrong:
        sys.exit(f"Not the same operation: {wrong}. Nothing was timed.")
    plain, steered = (found["sae-steer, eager", what] for what in ("plain", "vector"))
    if plain == steered:
        sys.exit("The vector changes nothing. Nothing was timed.")
    return shares


def version_in(folder: Path, name: str) -> str:
    """Version of a package that was installed into a folder."""
    found = {each.name: each.version for each in distributions(path=[str(folder)])}
    if name not in found:
        sys.exit(f"There is no {name} in {folder}. `make peers` installs it.")
    return found[name]


def seconds(peer: Child | Embedded, what: str) -> float:
    """Seconds of one batch."""
    return peer.run(what).seconds


def rows_of(
    peers: dict[str, Child | Embedded], times: dict[tuple[str, str], list[float]], shares: dict[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """A row for each, with its ratios to the compiled plain engine and to itself without steering."""
    rows = []
    for (name, what), values in times.items():
        bases = {"plain_compiled": ("plain vLLM, compiled", "plain"), "plain_eager": ("plain vLLM, eager", "plain")}
        if what == "vector":
            bases["itself"] = (name, "plain")
        ratios = {key: paired_ratio(values, times[base]) for key, base in bases.items() if base != (name, what)}
        rows.append(
            {
                "peer": name,
                "steered": what == "vector",
                "compiled": bool(peers[name].about.get("compiled", False)),
                "seconds_median": median(values),
                "same_tokens": shares[name, what],
                "ratios": {key: ratio.model_dump() for key, ratio in ratios.items()},
            }
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__, "peers")
    parser.add_argument("--lens", type=Path, help="folder that vllm-lens was installed into; left out without it")
    parser.add_argument("--saelens", help="Python of an environment with SAELens; left out without it")
    add_engine_options(parser, rounds=60, sequences=16)
    options = parser.parse_args()
    lens = {"vllm-lens": version_in(options.lens, "vllm-lens")} if options.lens else {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        parameters = write(folder)
        peers = start(options, folder, stack)
        todo = todo_of(peers)
        shares = same_tokens(peers, todo)
        calls = {(peer, what): partial(seconds, peers[peer], what) for peer, what in todo}
        times = in_turns(calls, rounds=options.rounds, minutes=options.minutes)
        rows = rows_of(peers, times, shares)
        about = {key: value for peer in peers.values() for key, value in peer.about.items() if key != "compiled"}
    write_result(
        options.out,
        "the same batch by each peer, plain and with a vector added at each hooked layer",
        threads=options.threads,
        versions={
            "transformers": transformers.__version__,
            **{key: about[key] for key in ("vllm", "sae_lens") if key in about},
            **lens,
        },
        parameters=parameters,
        dtype=options.dtype,
        sequences=options.sequences,
        prompt_tokens=PROMPT,
        output_tokens=TOKENS,
        hooked_layers=list(HOOKED),
        rounds=len(next(iter(times.values()))),
        why_baselines_differ=WHY,
        rows=rows,
    )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
