"""The path that users have: the official client, and ``vllm serve`` with the plugin."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import APIStatusError, OpenAI

from tests.conformance.answers import Asked, Choice, read_part
from tests.conformance.catalog import CACHE_BLOCKS, CONTEXT, STEP_TOKENS, Files
from tests.vllm.conftest import NAME, Setup, VllmServer

OPTIONS = {
    "--max-model-len": CONTEXT,
    "--max-num-seqs": 16,
    "--max-num-batched-tokens": STEP_TOKENS,
    "--num-gpu-blocks-override": CACHE_BLOCKS,
}
"""As those of the other engines."""


@dataclass
class Http:
    """A server."""

    server: VllmServer
    client: OpenAI
    caches: bool = True

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """As any path; no wrong variant can be switched on in a server."""
        assert wrong is None
        if cold:
            httpx.post(f"{self.server.url}/reset_prefix_cache", timeout=30).raise_for_status()
        return [self._wave(wave) for wave in waves]

    def _wave(self, wave: list[Asked]) -> list[list[Choice]]:
        with ThreadPoolExecutor(len(wave)) as pool:
            with self._paused() if len(wave) > 1 else nullcontext():
                futures = []
                for asked in wave:
                    futures.append(pool.submit(self._choices, asked))
                    time.sleep(0.02)  # so that they come in order
            return [future.result() for future in futures]

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Holds back what is asked within the block, and keeps what the prefix cache has."""
        url = self.server.url
        httpx.post(f"{url}/pause", params={"mode": "keep", "clear_cache": False}, timeout=30).raise_for_status()
        try:
            yield
        finally:
            httpx.post(f"{url}/resume", timeout=30).raise_for_status()

    def _choices(self, asked: Asked) -> list[Choice]:
        extra: dict[str, Any] = {"return_token_ids": True, "min_p": float(asked.choices > 1)}
        if asked.steering is not None:
            extra["steering"] = asked.steering
        try:
            reply = self.client.completions.create(
                model=NAME,
                prompt=asked.prompt,
                max_tokens=asked.tokens,
                n=asked.choices,
                temperature=float(asked.choices > 1),
                logprobs=0,
                extra_body=extra,
            )
        except APIStatusError as error:
            return [Choice([], [], error=error.code)] * asked.choices
        details = reply.usage.prompt_tokens_details
        return [
            Choice(
                tokens=choice.model_extra["token_ids"],
                logprobs=choice.logprobs.token_logprobs,
                applied=choice.model_extra.get("steering", {}).get("applied"),
                read=read_part(choice.model_extra.get("steering", {})),
                cached=details.cached_tokens or 0 if details is not None else 0,
            )
            for choice in reply.choices
        ]


@contextmanager
def served(files: Files, folder: Path) -> Iterator[Http]:
    """``vllm serve``, for as long as the block lasts; it writes to ``folder``."""
    arguments = tuple(str(part) for option in OPTIONS.items() for part in option)
    server = VllmServer(Setup(files.plugin(), arguments), folder)
    try:
        with server.openai() as client:
            yield Http(server, client)
    finally:
        server.stop()
