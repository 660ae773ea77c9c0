"""A tiny random model with a byte-level tokenizer behind a real engine and a real runtime, for tests of the engine."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TokenizersBackend

from sae_steer.capabilities import TRANSFORMERS
from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.compiler import compile_program
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.runtime import Runtime
from sae_steer.schema import parse_steering
from sae_steer.sites import Site
from sae_steer_server.engine.engine import Chunk, Engine, Sampling, TokenLogprob

VOCABULARY, EOS = 300, (257, 258)
SITE = "resid_post.1"


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """All bytes, three special tokens and some pairs of letters: characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "abcdefg" for b in "aeiou"][: VOCABULARY - 259]
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    vocabulary |= {name: 256 + i for i, name in enumerate(("<s>", "</s>", "<end>"))}
    vocabulary |= {a + b: 259 + i for i, (a, b) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizersBackend(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<end>"]
    )


def tiny_model(eos: Sequence[int] = EOS) -> PreTrainedModel:
    """Three layers of random weights, large enough for varied greedy text."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=256,
        eos_token_id=list(eos),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(eos)
    return model


@dataclass
class Answer:
    """A whole completion."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for chunk in self.chunks for entry in chunk.logprobs]

    @property
    def tokens(self) -> list[int]:
        """Token ids, of requests that ask for log-probabilities."""
        assert len(self.logprobs) == sum(chunk.tokens for chunk in self.chunks)
        return [entry.token for entry in self.logprobs]

    @property
    def reason(self) -> str | None:
        assert all(chunk.finish_reason is None for chunk in self.chunks[:-1])
        return self.chunks[-1].finish_reason


def prompts(count: int, longest: int = 100) -> list[list[int]]:
    choice = random.Random(count)
    return [[256, *(choice.randrange(256) for _ in range(choice.randrange(longest)))] for _ in range(count)]


def greedy(max_tokens: int, **changes: Any) -> Sampling:
    return Sampling(max_tokens, 0.0, 1.0, 0, **({"logprobs": 0} | changes))


def sampled(max_tokens: int, seed: int, **changes: Any) -> Sampling:
    return Sampling(max_tokens, **({"temperature": 1.0, "top_p": 0.9, "seed": seed, "logprobs": 0} | changes))


async def ask(engine: Engine, prompt: Sequence[int], sampling: Sampling, program: Program | None = None) -> Answer:
    answer = Answer()
    async for chunk in engine.generate(prompt, program, sampling):
        answer.chunks.append(chunk)
    return answer


async def ask_all(engine: Engine, asked: Sequence[tuple[Any, ...]]) -> list[Answer]:
    return await asyncio.gather(*(ask(engine, *each) for each in asked))


@dataclass
class Host:
    """An engine that runs, with what it runs on."""

    engine: Engine
    model: PreTrainedModel
    runtime: Runtime
    catalog: Catalog

    def program(self, value: float, positions: Any = "all", **changes: Any) -> Program:
        """A program that adds the catalog's vector."""
        edit = {"site": SITE, "vector": "push", "op": "add", "value": value, "positions": positions}
        steering = parse_steering({"interventions": [edit], **changes})
        program = compile_program(
            steering, self.catalog, TRANSFORMERS, self.runtime.limits, sites=self.runtime.sites, bos_token_id=None
        )
        assert program is not None
        return program

    async def settled(self) -> None:
        """Waits until the scheduler has let go of every request."""
        while self.runtime.slots_in_use or self.engine._steps.requests:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    slots: int = 4,
    max_running: int = 32,
    max_model_len: int = 256,
    saes: Sequence[CatalogSae] = (),
    **engine: Any,
) -> AsyncIterator[Host]:
    model = model or tiny_model()
    generator = torch.Generator().manual_seed(3)
    push = torch.randn(model.config.hidden_size, generator=generator)
    catalog = Catalog(saes, [Vector.make("push", push)])
    limits = Limits(max_programs=slots, rows=2, wide_programs=0)
    runtime = Runtime.attach(model, catalog, limits=limits, sites=[Site.parse(SITE)])
    made = Engine(
        model, tokenizer or tiny_tokenizer(), runtime, max_running=max_running, max_model_len=max_model_len, **engine
    )
    made.start()
    try:
        yield Host(made, model, runtime, catalog)
    finally:
        await made.stop(0)
        runtime.detach()
