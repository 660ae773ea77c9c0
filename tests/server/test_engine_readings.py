"""Readings in the engine under pressure: a request that loses its cache and comes back tells every token once."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.generation.continuous_batching.requests import RequestState

from sae_steer.capabilities import TRANSFORMERS
from sae_steer.catalog import CatalogSae
from sae_steer.compiler import compile_program
from sae_steer.program import Program
from sae_steer.readings import extend
from sae_steer.sae import open_sae
from sae_steer.schema import parse_steering
from tests.sae_files import write_saelens
from tests.server.engine_host import Answer, Host, ask_all, prompts, sampled, serving


def program_of(host: Host, steering: dict[str, Any]) -> Program:
    compiled = compile_program(
        parse_steering(steering),
        host.catalog,
        TRANSFORMERS,
        host.runtime.limits,
        sites=host.runtime.sites,
        bos_token_id=None,
    )
    assert compiled is not None
    return compiled


def told(answer: Answer) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for chunk in answer.chunks:
        if chunk.steering is not None:
            extend(found, chunk.steering["readings"])
    return found[0]


def test_what_is_computed_again_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resets: list[str] = []
    reset = RequestState.create_equivalent_initial_request

    def counting(state: RequestState) -> RequestState:
        resets.append(state.request_id)
        return reset(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counting)
    write_saelens(tmp_path, architecture="standard", d_in=64, n_features=32, hook_name="blocks.1.hook_resid_post")
    entry = CatalogSae.make("res", open_sae(tmp_path), whole=True)

    async def scenario() -> None:
        async with serving(max_model_len=96, saes=[entry]) as roomy, serving(
            max_model_len=96, saes=[entry], kv_tokens=160
        ) as tight:  # fmt: skip
            read = {"readings": {"sae": "res", "features": [3, 5], "top_k": 2, "positions": "all"}}
            asked = [(p, sampled(60, i)) for i, p in enumerate(prompts(6, 30))]
            expected = await ask_all(roomy.engine, [(*each, program_of(roomy, read)) for each in asked])
            assert not resets
            answers = await ask_all(tight.engine, [(*each, program_of(tight, read)) for each in asked])
            assert len(set(resets)) > 1
        for (prompt, _), answer, want in zip(asked, answers, expected, strict=True):
            assert answer.tokens == want.tokens
            mine, its = told(answer), told(want)
            assert mine["positions"] == list(range(len(prompt) + len(answer.tokens) - 1))
            assert mine["tokens"] == prompt + answer.tokens[:-1]
            assert np.allclose(mine["values"], its["values"], rtol=1e-4, atol=1e-4)
            assert [[f for f, _ in top] for top in mine["top"]] == [[f for f, _ in top] for top in its["top"]]

    asyncio.run(scenario())
