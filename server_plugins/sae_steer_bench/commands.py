"""The commands behind ``--launch``: what is run with the plugin, and what without it."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Literal

from sae_steer import embedded
from sae_steer_bench.errors import BenchError

_PLUGINS = "VLLM_PLUGINS"
_OURS = "sae_steer"
_DEMO = "demo"
_KEYS = frozenset({"--api-key", "--admin-key", "--hf-token"})
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_ATTACHED = (
    "--sae", "--whole", "--topk-threshold", "--labels", "--convert-cache", "--vector", "--site", "--profiles",
)  # fmt: skip
"""Options of ``sae-steer serve`` that attach something: without them the model has no hook."""
_SHARE = "--gpu-memory-utilization"
_HALF = 0.5
DEMO_COMMAND = "sae-steer serve demo --max-programs 64 --max-running 64 --max-concurrent 128 --log-level error"
"""What is measured where nothing is named."""


@dataclass(frozen=True, slots=True)
class Command:
    """A server's command.

    Args:
        argv: Its words, without address and port.
        environment: Variables that it wants beside this process's.
        host: Which host it starts.
        port: The port it asked for; None = any.
    """

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    host: Literal["vllm", "transformers"]
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Command":
        """Reads a command line; raises :class:`BenchError` for one that cannot be launched twice."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise BenchError(f"--launch {text!r} is not a command line: {error}.") from None
        environment: list[tuple[str, str]] = []
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment.append((name, value))
        host = _host(words)
        if host is None:
            raise BenchError(
                f"--launch {text!r}: only `vllm serve ...` and `sae-steer serve ...` can be started with and without "
                "the plugin. Start other servers yourself, and name them with --url and --plain-url."
            )
        options = {word.partition("=")[0].replace("_", "-") for word in words}  # vLLM takes both
        if options & _KEYS or any(_SECRET.search(name) for name, _ in environment):
            raise BenchError(
                "--launch: the command is written into the report, so it may hold no key. Give keys to this command, "
                "with --api-key and --admin-key or in its environment: it hands them on."
            )
        words[0] = _executable(words[0])
        words, ports = _without(words, "--port")
        words, _ = _without(words, "--host")
        if ports and not ports[-1].isdigit():
            raise BenchError(f"--launch: --port {ports[-1]!r} is not a number.")
        return cls(tuple(words), tuple(environment), host, int(ports[-1]) if ports else None)

    def with_plugin(self, port: int, profile: Path | None) -> tuple[list[str], dict[str, str]]:
        """Words and environment of the server under test; ``profile`` is a folder for traces of it."""
        words = [*self.argv, "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, **dict(self.environment)}
        if self.host == "vllm":
            environment.setdefault(_PLUGINS, ",".join((*_other_plugins(), _OURS)))
        if profile is not None and self.host == "vllm":
            words += ["--profiler-config", _profiler(profile)]
        elif profile is not None:
            words += ["--profile-dir", str(profile)]
        return words, environment

    def require_room_for_two(self, gpus: Sequence[str]) -> None:
        """Raises :class:`BenchError` where both servers would take more of a GPU's memory than there is of it.

        A vLLM takes the share that it is given of each of its GPUs, most of it where it is given none.
        """
        if self.host != "vllm" or not gpus:
            return
        # vLLM takes underscores for hyphens there.
        words = [re.sub(r"^--gpu_memory_utilization\b", _SHARE, word) for word in self.argv]
        shares = _without(words, _SHARE)[1]
        try:
            fits = bool(shares) and float(shares[-1]) <= _HALF
        except ValueError:
            fits = False
        if not fits:
            named = f"{_SHARE} {shares[-1]}" if shares else f"no {_SHARE}"
            raise BenchError(
                "--launch: two servers run at once, with the plugin and without, and do not both fit on "
                f"{gpus[0]}: the command names {named}. Add {_SHARE} 0.45 to it, or start the server without the "
                "plugin elsewhere and name it with --plain-url."
            )

    def without_plugin(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Words and environment of the same server without the plugin: on the embedded one, with nothing attached."""
        words = list(self.argv)
        environment = {**os.environ, **dict(self.environment)}
        if self.host == "vllm":
            named = environment.get(_PLUGINS)
            others = _other_plugins() if named is None else [name for name in named.split(",") if name != _OURS]
            environment[_PLUGINS] = ",".join(others)
        else:
            for option in _ATTACHED:
                words, _ = _without(words, option)
            after = words.index("serve") + 1
            if words[after : after + 1] == [_DEMO]:
                words[after : after + 1] = [str(embedded.MODEL), "--served-model-name", _DEMO]
        return [*words, "--host", "127.0.0.1", "--port", str(port)], environment


def _host(words: Sequence[str]) -> Literal["vllm", "transformers"] | None:
    for word, following in pairwise(words):
        if following == "serve" and Path(word).name == "vllm":
            return "vllm"
        if following == "serve" and Path(word).name in ("sae-steer", "sae_steer_cli"):
            return "transformers"
    return None


def _executable(word: str) -> str:
    """Where a program is: beside this Python, or on the path; raises :class:`BenchError`."""
    beside = Path(sys.executable).parent / word
    found = str(beside) if beside.is_file() else shutil.which(word)
    if found is None:
        raise BenchError(f"--launch: there is no program {word!r} here.")
    return found


def _without(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """A command line without an option that takes a value, and the values it had."""
    kept: list[str] = []
    values: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            values.append(next(rest, ""))
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        else:
            kept.append(word)
    return kept, values


def _other_plugins() -> list[str]:
    """vLLM's plugins of this environment that are not ours: unnamed, it would load them all."""
    return sorted({point.name for point in entry_points(group="vllm.general_plugins")} - {_OURS})


def _profiler(folder: Path) -> str:
    """vLLM's own profiler, for one step in the middle of a decode; Python stacks would cost more than the step."""
    options = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_with_stack": False,
        "torch_profiler_record_shapes": True,
        "ignore_frontend": True,
        "delay_iterations": 8,
        "max_iterations": 1,
    }
    return json.dumps(options)
