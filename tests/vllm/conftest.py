"""Real servers: the command ``vllm serve`` with the model that ships with the package, on a free port of 127.0.0.1.

Requests are made by the official client, one at a time or so that they share every step of the engine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from sae_steer import embedded
from sae_steer_bench.launch import Port

Json = dict[str, Any]

NAME = "demo"
"""The served model."""
SAE = embedded.SAE_NAME
ADMIN_KEY = "admin sesame"
BLOCK = 32
"""Tokens of a block of the prefix cache."""
LIMITS = {"features": 4, "wide_programs": 1, "wide_features": 32, "max_programs": 8}
"""One wide slot, so that two programs of more than four features must wait for each other."""
MAX_BODY = 65536
_START_SECONDS = 400


@dataclass(frozen=True)
class Setup:
    """How a server is started.

    Args:
        config: The plugin's configuration; None = it gets none.
        arguments: Of ``vllm serve``, beside the usual ones.
        environment: Variables over those of :data:`ENVIRONMENT`; one that is None is taken out.
        eager: Whether nothing is compiled.
        dtype: Of the weights and of the residual stream.
    """

    config: Mapping[str, Any] | None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    eager: bool = True
    dtype: str = "float32"


ENVIRONMENT = {
    "VLLM_PLUGINS": "sae_steer",
    "SAE_STEER_ADMIN_KEY": ADMIN_KEY,
    # Adds /pause and /resume, with which a test decides which requests share a batch.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def plugin_config(**changes: Any) -> Json:
    """A configuration of the plugin, with some of its fields replaced."""
    sae = {"name": SAE, "location": str(embedded.SAE), "whole": True}
    return {"saes": [sae], "limits": LIMITS, "max_body_bytes": MAX_BODY} | changes


def serve_command(setup: Setup, port: int) -> list[str]:
    """The command line of a server."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(embedded.MODEL), "--served-model-name", NAME,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", setup.dtype, "--max-model-len", "512",
        "--max-num-seqs", "32", "--max-num-batched-tokens", "1024", "--block-size", str(BLOCK),
        "--enable-prompt-tokens-details",
    ]  # fmt: skip
    if setup.eager:
        command.append("--enforce-eager")
    if setup.config is not None:
        command += ["--additional-config", json.dumps({"sae_steer": setup.config})]
    return [*command, *setup.arguments]


def environment_of(setup: Setup, folder: Path) -> dict[str, str]:
    """The environment of a server, which writes its caches to ``folder``."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "SAE_STEER_"))}
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    merged: dict[str, str | None] = {**mine, **ENVIRONMENT, **caches, **setup.environment}
    return {name: value for name, value in merged.items() if value is not None}


class VllmServer:
    """A running ``vllm serve``.

    Args:
        setup: How it is started.
        folder: Where it leaves its log and its caches.

    Raises:
        RuntimeError: It ended, or was not ready in time; the message holds its log.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        port = Port(None)
        self.url = f"http://127.0.0.1:{port.number}"
        self.base_url = f"{self.url}/v1"
        self._log = folder / "log.txt"
        with port, self._log.open("wb") as log:
            # A session of its own: what is left of it in the end can be named by one number.
            self.process = subprocess.Popen(
                serve_command(setup, port.number), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=folder, env=environment_of(setup, folder), start_new_session=True,
            )  # fmt: skip
            try:
                self._await_health()
            except BaseException:
                self.stop()
                raise

    def _await_health(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with {self.process.returncode}.\n{self.log}")
            if time.monotonic() > end:
                raise RuntimeError(f"The server was not ready after {_START_SECONDS} s.\n{self.log}")
            time.sleep(0.2)

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def healthy(self) -> bool:
        """Whether ``/health`` says so."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def http(self, **options: Any) -> httpx.Client:
        """A plain client of it."""
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def openai(self) -> OpenAI:
        """The official client of it."""
        return OpenAI(base_url=self.base_url, api_key="unused", timeout=120, max_retries=0)

    def metric(self, name: str) -> float:
        """The sum of all series of a metric of ``/metrics``."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"there is no metric {name}"
        return sum(map(float, values))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Holds back whatever is asked within the block; at its end all of it enters one step together."""
        httpx.post(f"{self.url}/pause", params={"mode": "keep"}, timeout=30).raise_for_status()
        try:
            yield
        finally:
            httpx.post(f"{self.url}/resume", timeout=30).raise_for_status()

    def processes(self) -> list[psutil.Process]:
        """The processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        """Ends it, and whatever it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@dataclass(frozen=True)
class Ask:
    """A greedy completion of given length.

    Args:
        prompt: Token ids.
        steering: The field ``steering``; None = it is left out.
        salt: Requests with equal salts share a prefix cache; None = this one shares with nobody.
    """

    prompt: Sequence[int]
    steering: Json | None = None
    salt: str | None = None


@dataclass(frozen=True)
class Choice:
    """What came back for it.

    Args:
        tokens: Token ids.
        logprobs: Their log-probabilities, to the last bit.
        applied: What steering says that it did.
        cached: Prompt tokens that came from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    applied: Json | None
    cached: int


def complete(client: OpenAI, ask: Ask, tokens: int) -> Choice:
    """Asks a server, and waits for the answer."""
    extra: Json = {"ignore_eos": True, "return_token_ids": True, "cache_salt": ask.salt or uuid.uuid4().hex}
    if ask.steering is not None:
        extra["steering"] = ask.steering
    reply = client.completions.create(
        model=NAME, prompt=list(ask.prompt), max_tokens=tokens, temperature=0, logprobs=0, extra_body=extra
    )
    (choice,) = reply.choices
    fields = choice.model_extra or {}
    assert ("steering" in fields) == ("steering" in (reply.model_extra or {})) == (ask.steering is not None)
    assert len(fields["token_ids"]) == tokens
    return Choice(
        tokens=fields["token_ids"],
        logprobs=choice.logprobs.token_logprobs,
        applied=fields["steering"]["applied"] if ask.steering is not None else None,
        cached=reply.usage.prompt_tokens_details.cached_tokens or 0,
    )


def together(server: VllmServer, asks: Sequence[Ask], tokens: int) -> tuple[list[Choice], int]:
    """Asks all at once.

    Returns:
        The answers, and the number of the engine's steps: ``tokens`` where all shared every step, and that times the
        number of requests where each ran alone.
    """
    steps, generated = "vllm:iteration_tokens_total_count", "vllm:generation_tokens_total"
    before, already = server.metric(steps), server.metric(generated)
    with server.openai() as client, ThreadPoolExecutor(len(asks)) as pool:
        with server.paused():
            futures = []
            for ask in asks:
                futures.append(pool.submit(complete, client, ask, tokens))
                time.sleep(0.03)  # so that they come in order
            time.sleep(0.5)  # for the front end to hand the last one over; a straggler would be seen in the steps
        answers = [future.result() for future in futures]
    end = time.monotonic() + 30
    while server.metric(generated) < already + tokens * len(asks):  # counted a little after they are sent
        assert time.monotonic() < end
        time.sleep(0.05)
    return answers, int(server.metric(steps) - before)


class Servers:
    """Starts servers, and keeps the usual one for as long as tests ask for it.

    Args:
        folder: Makes folders.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._usual: VllmServer | None = None

    def usual(self) -> VllmServer:
        """The server of most tests; a new one where a test has killed it."""
        if self._usual is None or self._usual.process.poll() is not None:
            profiles = self._folder() / "profiles"
            shutil.copytree(embedded.PROFILES, profiles)
            self._usual = VllmServer(Setup(plugin_config(profiles=str(profiles))), self._folder())
        return self._usual

    @contextmanager
    def serve(self, setup: Setup) -> Iterator[VllmServer]:
        """Another server, for as long as a ``with`` block lasts; raises :class:`RuntimeError`."""
        server = VllmServer(setup, self._folder())
        try:
            yield server
        finally:
            server.stop()

    def refused(self, setup: Setup) -> str:
        """What a server prints that does not start."""
        with pytest.raises(RuntimeError, match=r"The server ended with [1-9]") as error, self.serve(setup):
            pass
        return str(error.value)

    def stop(self) -> None:
        """Ends the usual one."""
        if self._usual is not None:
            self._usual.stop()
            self._usual = None


@pytest.fixture(scope="session")
def vllm_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Starts servers."""
    servers = Servers(lambda: tmp_path_factory.mktemp("vllm"))
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def vllm_server(vllm_servers: Servers) -> VllmServer:
    """The usual server: eager, float32, the embedded model with its SAE and copies of its profiles."""
    return vllm_servers.usual()


@pytest.fixture
def client(vllm_server: VllmServer) -> Iterator[httpx.Client]:
    """A plain client of the usual server."""
    with vllm_server.http() as http:
        yield http
