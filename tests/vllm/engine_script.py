"""A vLLM engine in a process of its own, in which a test runs functions: what it looks at is inside the engine.

vLLM reads its environment once a process, sets the process up for its workers, and warns at import: so the process of
the tests never imports it.
"""

import asyncio
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from sae_steer import embedded

Json = dict[str, Any]

ENVIRONMENT = {
    "VLLM_PLUGINS": "sae_steer",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""Of engines whose model is spread over two processes."""
OPTIONS: Json = {
    "model": str(embedded.MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 192,
    "max_num_seqs": 16,
    "block_size": 32,
}
_START_SECONDS, _CALL_SECONDS = 240, 240


def plugin(**more: Any) -> Json:
    """The plugin's configuration: the SAE that ships with the model, and what is given."""
    sae = {"name": embedded.SAE_NAME, "location": str(embedded.SAE), "whole": True}
    return {"saes": [sae], **more}


def start_llm(config: Json | None, options: Mapping[str, Any]) -> Any:
    """Starts ``vllm.LLM`` with the plugin's configuration; None = without."""
    from vllm import LLM

    plugin: Json = {"additional_config": {"sae_steer": config} if config is not None else {}}
    return LLM(**(OPTIONS | plugin | dict(options)))


def nothing() -> None:
    """Starts nothing."""


@dataclass(frozen=True)
class Ask:
    """A request.

    Args:
        prompt: Token ids.
        steering: The field ``steering``; None = nothing is asked.
        sampling: Of ``SamplingParams``, over greedy answers with log-probabilities.
        options: Of ``LLM.generate`` for this request: ``lora`` (name, number, folder) and ``priority``.
    """

    prompt: Sequence[int]
    steering: Json | None = None
    sampling: Mapping[str, Any] | None = None
    lora: tuple[str, int, str] | None = None
    priority: int = 0

    def params(self) -> Any:
        """Its ``SamplingParams``, in the engine's process."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        given = {"temperature": 0.0, "max_tokens": 16, "logprobs": 0, **(self.sampling or {})}
        if "structured_outputs" in given:
            given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
        if self.steering is not None:
            given["extra_args"] = {**given.get("extra_args", {}), "steering": self.steering}
        return SamplingParams(**given)

    def lora_request(self) -> Any:
        """Its ``LoRARequest``, in the engine's process."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(*self.lora) if self.lora is not None else None


@dataclass(frozen=True)
class Answer:
    """One choice of an answer.

    Args:
        tokens: The completion.
        logprobs: Log-probabilities of its tokens.
        text: The completion as text.
        reason: Why it ended.
        block: What the plugin says of it.
        cached: Prompt tokens that came from the prefix cache.
        likeliest: For each token, log-probabilities of it and of as many others as were asked for, by id.
        prompt_logprobs: Log-probabilities of the prompt's tokens from the second on, where they were asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    text: str
    reason: str | None
    block: Json | None
    cached: int
    likeliest: list[dict[int, float]]
    prompt_logprobs: list[float] | None = None

    @property
    def applied(self) -> Json | None:
        """The ``applied`` block."""
        return self.block["applied"] if self.block is not None else None


def answers_of(output: Any) -> list[Answer]:
    """The choices of a ``RequestOutput``, as plain data."""
    prompt = None
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        prompt = [at[token].logprob for token, at in pairs]
    found = []
    for choice in output.outputs:
        tokens = list(choice.token_ids)
        likeliest = [{token: each.logprob for token, each in at.items()} for at in choice.logprobs]
        logprobs = [at[token] for token, at in zip(tokens, likeliest, strict=True)]
        block = getattr(choice, "steering", None)
        cached = output.num_cached_tokens or 0
        found.append(Answer(tokens, logprobs, choice.text, choice.finish_reason, block, cached, likeliest, prompt))
    return found


def generate(llm: Any, asked: Sequence[Ask], *, cold: bool = True) -> list[list[Answer]]:
    """Answers requests in one batch; ``cold`` empties the prefix cache first."""
    if cold:
        empty_cache(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": list(each.prompt)} for each in asked],
        [each.params() for each in asked],
        use_tqdm=False,
        lora_request=[each.lora_request() for each in asked],
        priority=[each.priority for each in asked],
    )
    return [answers_of(output) for output in outputs]


def empty_cache(llm: Any) -> None:
    """Empties the prefix cache; raises ``RuntimeError`` where a request still uses it."""
    if llm.reset_prefix_cache():
        return
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None and core.batch_queue:  # the step after the last token, of asynchronous scheduling
        llm.llm_engine.step()
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache is in use")


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine that has it in its own process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


class EngineFailed(Exception):
    """A function failed in the engine's process, or the process ended; the message says how."""


class Host:
    """A process with an engine in it.

    Args:
        connection: To the process.
        process: The process.
        log: What it prints.
    """

    def __init__(self, connection: Connection, process: Any, log: Path) -> None:
        self._connection = connection
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = _CALL_SECONDS, **kwargs: Any) -> Any:
        """What ``function(engine, *args, **kwargs)`` gives in the process; raises :class:`EngineFailed`."""
        self._connection.send((function, args, kwargs))
        try:
            if not self._connection.poll(seconds):
                raise EngineFailed(f"no answer in {seconds} s\n{self.log[-8000:]}")
            good, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise EngineFailed(f"the process has ended\n{self.log[-8000:]}") from None
        if not good:
            raise EngineFailed(value)
        return value


@contextmanager
def hosted(
    folder: Path, start: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
) -> Iterator[Host]:
    """A process in which ``start(*args)`` has made an engine; it ends with the block.

    Args:
        folder: Where it leaves its log.
        start: A function of a module.
        args: Its arguments.
        environment: Variables over :data:`ENVIRONMENT`.

    Raises:
        EngineFailed: The engine does not start.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    log = folder / f"{start.__name__}.log"
    process = context.Process(target=_main, args=(there, {**ENVIRONMENT, **(environment or {})}, str(log)))
    process.start()
    there.close()
    host = Host(here, process, log)
    try:
        host.run(start, *args, seconds=_START_SECONDS)
        yield host
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
        here.close()  # the process ends by itself once nobody asks any more
        process.join(30)
        process.kill()
        process.join()
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def _shut_down(engine: Any) -> None:
    """Ends an engine's processes: at the end of a process of multiprocessing, vLLM's own way of doing so is not run."""
    core = engine.llm_engine.engine_core if hasattr(engine, "llm_engine") else engine
    core.shutdown()


def _main(connection: Connection, environment: Mapping[str, str], log: str) -> None:
    """What the process does: the first call makes the engine, each later one is given it."""
    os.environ.update(environment)
    with open(log, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    engine: list[Any] = []
    with asyncio.Runner() as runner:  # engines of asyncio live in one loop
        while True:
            try:
                function, args, kwargs = connection.recv()
            except EOFError:
                if multiprocessing.active_children():
                    _shut_down(*engine)
                os._exit(0)  # nothing else is to be put away, which vLLM takes seconds for
            try:
                value = function(*engine, *args, **kwargs)
                if asyncio.iscoroutine(value):
                    value = runner.run(value)
            except Exception as error:  # the edge of the process: the test is told
                connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
                continue
            if not engine:
                engine.append(value)
                value = None
            connection.send((True, value))
