"""Paths in the process of the tests: ``sae_steer.attach``, and the engine of the embedded server."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sae_steer
from sae_steer import Steer, embedded
from sae_steer.capabilities import TRANSFORMERS
from sae_steer.compiler import compile_program
from sae_steer.errors import RunFailed
from sae_steer.runtime import Runtime
from sae_steer.schema import parse_steering
from sae_steer.sites import Site
from sae_steer_server.engine.engine import Chunk, Engine, Sampling
from sae_steer_server.http.generation import Outcome
from tests.conformance.answers import Asked, Choice, read_part
from tests.conformance.catalog import CONTEXT, LIMITS, SAE, SITES, Files


@dataclass
class Attached:
    """``attach``: the requests of a wave are the rows of a batch, where they are of one length."""

    steer: Steer
    model: PreTrainedModel
    caches: bool = False

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """As any path."""
        del wrong, cold
        answered: list[list[list[Choice]]] = []
        for wave in waves:
            found: dict[int, list[Choice]] = {}
            for numbers in _batches(wave):
                asked = [wave[i] for i in numbers]
                try:
                    choices = self._generate(asked)
                except RunFailed as error:  # it ends the whole batch, as an exception does
                    choices = [[Choice([], [], error=error.code)] * each.choices for each in asked]
                found |= dict(zip(numbers, choices, strict=True))
            answered.append([found[i] for i in range(len(wave))])
        return answered

    def _generate(self, asked: list[Asked]) -> list[list[Choice]]:
        longest, n = max(len(each.prompt) for each in asked), asked[0].choices
        ids = torch.tensor([[0] * (longest - len(each.prompt)) + each.prompt for each in asked])
        mask = torch.tensor([[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in asked])
        with self.steer.rows([each.steering for each in asked]) as rows:
            out: Any = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=asked[0].tokens,
                num_return_sequences=n,
                do_sample=n > 1,  # transformers has no greedy choices beside each other
                top_k=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            reports = rows.reports()
        tokens = out.sequences[:, longest:]
        logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
        choices = [
            _choice(t, p, report) for t, p, report in zip(tokens.tolist(), logprobs.tolist(), reports, strict=True)
        ]
        return [choices[i * n : (i + 1) * n] for i in range(len(asked))]


def _choice(tokens: list[int], logprobs: list[float], report: dict[str, Any] | None) -> Choice:
    applied, read = {**report} if report is not None else None, None
    if applied is not None and "readings" in applied:
        read = {key: applied.pop(key) for key in ("readings", "triggers")}
    return Choice(tokens, logprobs, applied, read=read)


def _batches(wave: list[Asked]) -> Iterator[list[int]]:
    """Numbers of the requests that can be rows of one batch; one that must fail would end its neighbours."""

    def kind(i: int) -> tuple[int, int, int]:
        return wave[i].tokens, wave[i].choices, i if wave[i].fails else -1

    for _, numbers in itertools.groupby(sorted(range(len(wave)), key=kind), key=kind):
        yield list(numbers)


@contextmanager
def attached(files: Files, model: PreTrainedModel) -> Iterator[Attached]:
    """``attach`` on the model."""
    # Rows of a batch cannot wait for a slot: more different programs than slots are refused.
    limits = replace(LIMITS, max_programs=16)
    with sae_steer.attach(
        model,
        {SAE: embedded.SAE},
        vectors=files.vectors,
        profiles=files.profiles,
        sites=SITES,
        whole=[SAE],
        limits=limits,
    ) as steer:
        yield Attached(steer, model)


@dataclass
class Embedded:
    """The engine of the embedded server."""

    runner: asyncio.Runner
    engine: Engine
    runtime: Runtime
    bos: int
    caches: bool = False

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """As any path."""
        del wrong, cold
        return [self.runner.run(self._wave(wave)) for wave in waves]

    async def _wave(self, wave: list[Asked]) -> list[list[Choice]]:
        flat = await asyncio.gather(*(self._choice(each) for each in wave for _ in range(each.choices)))
        choices = iter(flat)
        return [list(itertools.islice(choices, each.choices)) for each in wave]

    async def _choice(self, asked: Asked) -> Choice:
        runtime = self.runtime
        program = compile_program(
            parse_steering(asked.steering or {}),
            runtime.catalog,
            TRANSFORMERS,
            runtime.limits,
            sites=runtime.sites,
            bos_token_id=self.bos,
        )
        chunks: list[Chunk] = []
        try:
            async for chunk in self.engine.generate(
                asked.prompt, program, Sampling(asked.tokens, 0.0, 1.0, 0, logprobs=0)
            ):
                chunks.append(chunk)
        except RunFailed as error:
            return Choice([], [], error=error.code)
        entries = [entry for chunk in chunks for entry in chunk.logprobs]
        block = _joined(chunks)
        return Choice(
            [e.token for e in entries], [e.logprob for e in entries], block.get("applied"), read=read_part(block)
        )


def _joined(chunks: list[Chunk]) -> dict[str, Any]:
    """Steering's block of a stream."""
    outcome = Outcome()
    for chunk in chunks:
        outcome.add(chunk)
    return outcome.steering or {}


@contextmanager
def embedded_engine(files: Files, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Embedded]:
    """The embedded server's engine on the model."""
    runtime = Runtime.attach(model, files.catalog(), limits=LIMITS, sites=[Site.parse(site) for site in SITES])
    engine = Engine(model, tokenizer, runtime, max_running=16, max_model_len=CONTEXT)
    engine.start()
    with asyncio.Runner() as runner:
        try:
            yield Embedded(runner, engine, runtime, int(model.config.bos_token_id))
        finally:
            runner.run(engine.stop(0))
            runtime.detach()
