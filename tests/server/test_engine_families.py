"""Every family of SAEs in one engine, each with a clamp of its own in one batch."""

import asyncio
from dataclasses import replace
from pathlib import Path

import torch

import sae_steer
from sae_steer.capabilities import TRANSFORMERS
from sae_steer.catalog import CatalogSae
from sae_steer.compiler import compile_program
from sae_steer.program import Program
from sae_steer.sae import Activation, open_sae
from sae_steer.schema import parse_steering
from sae_steer.sites import Site
from tests.sae_writers.every import WRITERS, written
from tests.server.engine_host import SITE, Answer, Host, ask_all, greedy, prompts, serving, tiny_model

TOKENS = 12
CLAMP = {"features": [3], "op": "clamp", "value": 2.0, "units": "residual_norm"}


def test_each_family_serves_its_clamp(tmp_path: Path) -> None:
    model, site = tiny_model(), Site.parse(SITE)
    saes = {name: open_sae(written(tmp_path / name, name, model.config.hidden_size)) for name in WRITERS}
    whole = [name for name, sae in saes.items() if sae.spec.activation is Activation.TOPK]
    entries = [CatalogSae.make(name, sae, site=site, whole=name in whole) for name, sae in saes.items()]
    (prompt,) = prompts(1, 40)
    asked = {name: {"interventions": [{"sae": name, **CLAMP}]} for name in saes}

    def program(host: Host, name: str) -> Program:
        made = compile_program(
            parse_steering(asked[name]), host.catalog, TRANSFORMERS, host.runtime.limits, sites=host.runtime.sites,
            bos_token_id=None,
        )  # fmt: skip
        assert made is not None
        return made

    async def scenario() -> list[Answer]:
        async with serving(model, saes=entries, slots=len(saes)) as host:
            requests = [(prompt, greedy(TOKENS), program(host, name)) for name in saes]
            return await ask_all(host.engine, [*requests, (prompt, greedy(TOKENS))])

    *answers, plain = asyncio.run(scenario())
    at = {name: replace(sae, spec=replace(sae.spec, site=site)) for name, sae in saes.items()}
    with sae_steer.attach(tiny_model(), saes=at, whole=whole) as steer:
        for name, answer in zip(saes, answers, strict=True):
            with steer.rows([asked[name]]):
                out = steer.model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)
            assert answer.tokens == out[0, len(prompt) :].tolist(), name
            assert answer.tokens != plain.tokens, f"{name}: a clamp that changes nothing would prove nothing"
