"""Load from ``vllm bench serve``, the generator that vLLM's own numbers come from.

It gives all requests one body (``--extra-body``). Requests that differ call one model by several names, which it takes
in turn (``--lora-modules``): here these are profiles, stored for as long as they are needed. Each measurement starts a
process of its own, which is given what it needs in its environment and leaves what it measured in a file.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self
from zlib import crc32

import httpx

from sae_steer_bench.errors import BenchError, LoadFailed
from sae_steer_bench.load import Address, Work
from sae_steer_bench.records import LoadPlan
from sae_steer_bench.samples import Batch, Sample
from sae_steer_http import ADMIN_HEADER
from sae_steer_http.client import message_of

_START = 300.0  # seconds in which the generator itself starts: it imports all of vLLM
_SHOWN = 2000  # characters of what a failed process printed
_AS_PROFILES = "vllm bench serve takes requests that differ as names of models, here profiles"


def command() -> str | None:
    """The ``vllm`` of this environment, or of the path; None = there is none."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.is_file() else shutil.which("vllm")


class VllmLoad:
    """Runs ``vllm bench serve``, a process for each measurement.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer, which makes the prompts.
        api_key: Bearer key; None = the server wants none.
        admin_key: Key with which profiles are stored; None = cases whose requests differ are skipped.
        timeout: Seconds that an answer may take.

    Raises:
        BenchError: vLLM is not installed.
    """

    def __init__(self, tokenizer: str, api_key: str | None, admin_key: str | None, timeout: float) -> None:
        found = command()
        if found is None:
            raise BenchError("vLLM is not installed here. Use --generator openai.")
        self._command = found
        self._tokenizer = tokenizer
        self._key = api_key
        self._admin_key = admin_key
        self._timeout = timeout
        self._stored: dict[str, set[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for url, names in self._stored.items():
            with self._admin(url) as client:
                for name in names:
                    try:
                        client.delete(f"/v1/steering/profiles/{name}")
                    except httpx.HTTPError:  # the server is gone, and nothing can be left on it
                        break

    def obstacle(self, address: Address, bodies: Sequence[Mapping[str, Any] | None]) -> str | None:
        """Requests that differ need an admin key, and a server that stores profiles: they are stored to find out."""
        if len(bodies) == 1:
            return None
        if self._admin_key is None:
            return f"{_AS_PROFILES}, and storing those takes --admin-key; or use --generator openai"
        try:
            for body in bodies:
                self._name(address, body)
        except LoadFailed as error:
            return f"{_AS_PROFILES}, and {error.message} Or use --generator openai."
        return None

    def run(self, address: Address, work: Work, load: LoadPlan) -> Batch:
        """Sends the requests; raises :class:`LoadFailed`."""
        with TemporaryDirectory(prefix="sae-steer-bench.") as folder:
            arguments = [*self._arguments(address, work, load), "--result-dir", folder, "--result-filename", "r.json"]
            environment = {**os.environ, "VLLM_PLUGINS": ""}
            if self._key is not None:
                environment["OPENAI_API_KEY"] = self._key
            limit = _START + self._timeout * ceil(work.requests / load.concurrency)
            if load.rate is not None:
                limit += work.requests / load.rate
            try:
                done = subprocess.run(
                    [self._command, "bench", "serve", *arguments],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
                    timeout=limit, env=environment, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise LoadFailed(f"vllm bench serve did not end within {limit:g} s.") from None
            file = Path(folder) / "r.json"
            if done.returncode != 0 or not file.is_file():
                raise LoadFailed(f"vllm bench serve failed ({done.returncode}): {done.stdout[-_SHOWN:].strip()}")
            return _batch(json.loads(file.read_text()))

    def _arguments(self, address: Address, work: Work, load: LoadPlan) -> list[str]:
        """The command line. Prompts and seeds are numbers there: the work's seed is made one."""
        arguments = [
            "--backend", "openai", "--base-url", address.url, "--model", address.model,
            "--tokenizer", self._tokenizer, "--dataset-name", "random", "--random-input-len", str(work.prompt_tokens),
            "--random-output-len", str(work.output_tokens), "--num-prompts", str(work.requests),
            "--max-concurrency", str(load.concurrency), "--seed", str(crc32(work.seed.encode())),
            "--temperature", "0", "--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed",
        ]  # fmt: skip
        if load.rate is not None:
            arguments += ["--request-rate", str(load.rate)]
        if len(work.bodies) > 1:
            names = [self._name(address, body) for body in work.bodies]
            return [*arguments, "--lora-assignment", "round-robin", "--lora-modules", *names]
        if work.bodies[0] is not None:
            arguments += ["--extra-body", json.dumps({"steering": work.bodies[0]})]
        return arguments

    def _name(self, address: Address, body: Mapping[str, Any] | None) -> str:
        """A model's name that means a body: the model's own, or that of a profile, which is stored."""
        if body is None:
            return address.model
        text = json.dumps(body["interventions"], sort_keys=True)
        name = f"bench-{sha256(text.encode()).hexdigest()[:16]}"
        stored = self._stored.setdefault(address.url, set())
        if name not in stored:
            profile = {"name": name, "description": "of sae-steer bench", "interventions": body["interventions"]}
            try:
                with self._admin(address.url) as client:
                    reply = client.put(f"/v1/steering/profiles/{name}", json=profile)
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                raise LoadFailed(f"{address.url} does not answer where profiles are stored: {reason}.") from error
            if not reply.is_success:
                said = f"HTTP {reply.status_code}: {message_of(reply)}"
                raise LoadFailed(f"{address.url} does not store them ({said}).")
            stored.add(name)
        return f"{address.model}:{name}"

    def _admin(self, url: str) -> httpx.Client:
        headers = {ADMIN_HEADER: self._admin_key or ""}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx.Client(base_url=url, headers=headers, timeout=60)


def _batch(result: Mapping[str, Any]) -> Batch:
    """What its file says; raises :class:`LoadFailed` where a request was not answered."""
    errors = [error for error in result["errors"] if error]
    if errors or result["failed"]:
        first = errors[0].strip().splitlines()[-1] if errors else "it does not say why"
        raise LoadFailed(f"{result['failed']} requests of vllm bench serve were not answered: {first}")
    samples = [
        Sample(ttft, tuple(gaps), tokens)
        for ttft, gaps, tokens in zip(result["ttfts"], result["itls"], result["output_lens"], strict=True)
    ]
    return Batch(samples, result["duration"])
