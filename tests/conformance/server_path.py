"""The path that users of the embedded server have: the official client, and the server on a free port."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from sae_steer_server.settings import Settings
from tests.conformance.answers import Asked, Choice
from tests.server.conftest import Served


@dataclass
class Server:
    """A server of a model with a byte-level tokenizer, whose tokens are known by their texts.

    Args:
        client: The official client of it.
        tokens: From :func:`token_ids`.
    """

    client: OpenAI
    tokens: dict[str, int]
    caches: bool = False

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """As any path; no wrong variant can be switched on in it."""
        assert wrong is None
        del cold
        answered = []
        for wave in waves:
            with ThreadPoolExecutor(len(wave)) as pool:
                answered.append(list(pool.map(self._choices, wave)))
        return answered

    def _choices(self, asked: Asked) -> list[Choice]:
        reply = self.client.completions.create(
            model="m",
            prompt=asked.prompt,
            max_tokens=asked.tokens,
            n=asked.choices,
            temperature=0,
            logprobs=0,
            extra_body={"steering": asked.steering} if asked.steering is not None else None,
        )
        return [
            Choice(
                tokens=[self.tokens.get(text, -1) for text in choice.logprobs.tokens or ()],
                logprobs=choice.logprobs.token_logprobs,
                applied=choice.model_extra.get("steering", {}).get("applied"),
            )
            for choice in reply.choices
        ]


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of a byte-level tokenizer's tokens by text, but for special ones and those that are no whole characters."""
    special = set(tokenizer.all_special_ids)
    texts = {token: str(tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special}
    return {text: token for token, text in texts.items() if "\ufffd" not in text}


@contextmanager
def embedded_server(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Iterator[Server]:
    """The embedded server with some settings, for as long as the block lasts."""
    served = Served(settings)
    try:
        with served.openai() as client:
            yield Server(client, token_ids(tokenizer))
    finally:
        served.stop()
