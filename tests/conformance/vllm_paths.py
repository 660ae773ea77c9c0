"""Paths through vLLM: engines in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from sae_steer import embedded
from tests.conformance.answers import Asked, Choice
from tests.conformance.catalog import BLOCK, CACHE_BLOCKS, CONTEXT, STEP_TOKENS
from tests.conformance.vllm_engine import EngineSettings

OPTIONS: Mapping[str, Any] = {
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "max_num_seqs": 16,
    "max_num_batched_tokens": STEP_TOKENS,
    "block_size": BLOCK,
    "num_gpu_blocks_override": CACHE_BLOCKS,
    "enable_prefix_caching": True,
    "seed": 0,
}
"""Of every engine."""
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_PLUGINS": "sae_steer",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
TWO_WORKERS: Mapping[str, str] = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""Variables of engines with two workers, which need a core each."""


class Loaded(Protocol):
    """What an engine loads beside its model."""

    @property
    def folder(self) -> Path:
        """Where it may leave its caches."""
        ...

    def plugin(self) -> dict[str, Any]:
        """The plugin's configuration."""
        ...


@dataclass
class Engine:
    """An engine in another process."""

    process: "subprocess.Popen[str]"
    log: IO[str]
    caches: bool = True

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """As any path."""
        self._say({"waves": [[asdict(each) for each in wave] for wave in waves], "wrong": wrong, "cold": cold})
        return [[[Choice(**choice) for choice in choices] for choices in wave] for wave in self._hear()]

    def _say(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            print(json.dumps(value), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(f"the engine has died:\n{self.tail()}") from None

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine has died:\n{self.tail()}")
        return json.loads(line)

    def tail(self) -> str:
        """The last that it printed."""
        self.log.flush()
        self.log.seek(0)
        return self.log.read()[-8000:]


def _environment(files: Loaded, changes: Mapping[str, str]) -> dict[str, str]:
    """Variables of an engine's process: none of vLLM's but these, and compiled code in a folder of the run's own."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    caches = {name: str(files.folder / name) for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")}
    return {**others, **caches, **ENVIRONMENT, **changes}


@contextmanager
def engine(
    files: Loaded,
    *,
    model: Path = embedded.MODEL,
    environment: Mapping[str, str] | None = None,
    v2: bool = False,
    **options: Any,
) -> Iterator[Engine]:
    """An engine, for as long as the block lasts.

    Args:
        files: The catalog.
        model: Folder of the model.
        environment: Variables of its process.
        v2: As in :class:`EngineSettings`.
        options: Of ``vllm.LLM``, beside :data:`OPTIONS`.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.vllm_engine"],
            env=_environment(files, environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # what is left of it in the end can be named by one number
        ) as process,
    ):
        running = Engine(process, log)
        try:
            running._say(asdict(EngineSettings(str(model), files.plugin(), {**OPTIONS, **options}, v2)))
            assert running._hear() == "ready"
            yield running
        finally:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
