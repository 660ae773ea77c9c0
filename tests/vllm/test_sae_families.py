"""Every family of SAEs in one engine, each with a clamp of its own in one batch."""

from dataclasses import replace
from pathlib import Path

import pytest

import sae_steer
from sae_steer.sae import Activation, open_sae
from sae_steer.sites import Site
from tests.sae_writers.every import WRITERS, written
from tests.steered_models import embedded_model
from tests.vllm.engine_script import Ask, generate, hosted, start_llm
from tests.vllm.teacher import Teacher

SITE = "resid_post.1"
CLAMP = {"features": [3], "op": "clamp", "value": 2.0, "units": "residual_norm"}


@pytest.mark.slow
def test_each_family_serves_its_clamp(tmp_path: Path) -> None:
    model = embedded_model()
    places = {name: written(tmp_path / name, name, model.model.config.hidden_size) for name in WRITERS}
    saes = {name: open_sae(place) for name, place in places.items()}
    whole = [name for name, sae in saes.items() if sae.spec.activation is Activation.TOPK]
    entries = [
        {"name": name, "location": str(place), "site": SITE, "whole": name in whole} for name, place in places.items()
    ]
    asked = [Ask(model.prompt, {"interventions": [{"sae": name, **CLAMP}]}) for name in saes]
    plain = Ask(model.prompt, None)
    with hosted(tmp_path, start_llm, {"saes": entries}, {}) as host:
        *answers, unsteered = host.run(generate, [*asked, plain])
    at = {name: replace(sae, spec=replace(sae.spec, site=Site.parse(SITE))) for name, sae in saes.items()}
    with sae_steer.attach(model.model, saes=at, whole=whole) as steer:
        teacher = Teacher(steer)
        for name, ask, [answer] in zip(saes, asked, answers, strict=True):
            faults = teacher.faults(ask, answer)
            assert not faults, f"{name}: {faults}"
            assert answer.tokens != unsteered[0].tokens, f"{name}: a clamp that changes nothing would prove nothing"
