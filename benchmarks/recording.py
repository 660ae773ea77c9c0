"""What the CPU benchmarks have in common: measurements in turns, and what is written down beside them."""

import argparse
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

import sae_steer
from sae_steer_bench.machine import cpu_name
from sae_steer_bench.rounds import LEAST_ROUNDS

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
RESULTS = Path("benchmarks/results")


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser that knows where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def add_engine_options(parser: argparse.ArgumentParser, *, rounds: int, sequences: int) -> None:
    """Options of a benchmark that lets engines take turns."""
    parser.add_argument("--rounds", type=int, default=rounds, help="the most rounds")
    parser.add_argument(
        "--minutes", type=float, default=60, help=f"the most minutes of rounds, once {LEAST_ROUNDS} are done"
    )
    parser.add_argument("--starts", type=int, default=3, help="how often the engines are started, for a share of both")
    parser.add_argument("--sequences", type=int, default=sequences)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


def in_turns(
    calls: Mapping[K, Callable[[], V]],
    *,
    rounds: int,
    minutes: float,
    enough: Callable[[Mapping[K, list[V]]], bool] = lambda _: False,
) -> dict[K, list[V]]:
    """What each call returns, once a round and in a new order each time.

    Args:
        calls: What is measured.
        rounds: The most rounds.
        minutes: After which no further round is begun, once there are five.
        enough: Whether what was found is enough; asked at every tenth round from the thirtieth on.
    """
    found: dict[K, list[V]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0)
    deadline = time.monotonic() + 60 * minutes
    for number in tqdm(range(rounds), desc="rounds"):
        if number >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        shuffle.shuffle(order)
        for name in order:
            found[name].append(calls[name]())
        if number >= 30 and number % 10 == 0 and enough(found):
            break
    return found


def in_starts(starts: int, measure: Callable[[], Mapping[K, list[V]]]) -> dict[K, list[V]]:
    """What ``measure`` finds in some starts of its engines, one behind the other.

    Two starts of one engine differ by a percent or two, depending on where its memory comes to lie: pairs of one start
    alone would take that for what is measured.
    """
    found: dict[K, list[V]] = {}
    for _ in tqdm(range(starts), desc="starts"):
        for name, values in measure().items():
            found.setdefault(name, []).extend(values)
    return found


def write(out: Path, what: str, *, threads: int, versions: Mapping[str, str], **found: Any) -> None:
    """Writes a result: what it is of, how it was made, on what, and what was found."""
    result = {
        "what": what,
        "command": shlex.join(["python", *sys.argv]),
        "hardware": {"cpu": cpu_name(), "threads": threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sae_steer": sae_steer.__version__,
            **versions,
        },
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
