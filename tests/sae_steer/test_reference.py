"""Every request means on a running model what the float64 definition says: greedy tokens, on a real model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import sae_steer
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.sae import open_sae
from tests import real_sae, reference_model

LAYERS = (1, 3)
NEW = 24
PROMPT = "Once upon a time, there was a little girl named Lily. She"


class Real:
    """A real model with SAEs trained on it, and the features that fire on the prompt."""

    def __init__(self, assets: Path, folder: Path) -> None:
        path = assets / "models" / "stories260k"
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        self.model64 = reference_model.in_float64(self.model)
        with (assets / "data" / "tinystories_2k.jsonl").open() as file:
            texts = [json.loads(line)["text"] for line, _ in zip(file, range(200), strict=False)]
        self.prompt: list[int] = self.tokenizer(PROMPT)["input_ids"]
        self.folders: dict[str, Path] = {}
        self.top: dict[int, list[int]] = {}
        for layer in LAYERS:
            x = real_sae.residuals(self.model, self.tokenizer, texts, layer)
            tensors = real_sae.train(x, 256, steps=250)
            maxima = real_sae.activations(tensors, x).amax(dim=0)
            for architecture in ("jumprelu", "topk"):
                name = f"{architecture}{layer}"
                target = folder / name
                real_sae.save(tensors, target, architecture=architecture, layer=layer, maxima=maxima)
                self.folders[name] = target
            with torch.no_grad():
                here = self.model(torch.tensor([self.prompt]), output_hidden_states=True).hidden_states[layer + 1][0]
            fired = real_sae.activations(tensors, here)[1:].sum(dim=0)
            self.top[layer] = fired.topk(6).indices.tolist()


@pytest.fixture(scope="module")
def real(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return Real(assets, tmp_path_factory.mktemp("saes"))


def _requests(real: Real, sae: str, layer: int, other: str) -> dict[str, dict[str, Any]]:
    a, b, *_ = real.top[layer]
    c, d, *_ = real.top[LAYERS[1]]

    def one(op: str, features: list[int], **more: Any) -> dict[str, Any]:
        return {"sae": sae, "features": features, "op": op, **more}

    return {
        "clamp": {"interventions": [one("clamp", [a], value=1.0, units="reference_max")]},
        "add in lengths of the residual": {"interventions": [one("add", [a], value=0.5, units="residual_norm")]},
        "scale the completion": {"interventions": [one("scale", [a, b], value=[3.0, 4.0])]},
        "ablate": {"interventions": [one("ablate", real.top[layer])]},
        "floor": {"interventions": [one("floor", [a], value=0.8, units="reference_max", positions="completion")]},
        "cap": {"interventions": [one("cap", real.top[layer], value=0.1)]},
        "mask a range": {"interventions": [one("mask_range", real.top[layer], lo=0.5, hi=50.0)]},
        "gain": {"interventions": [one("gain", real.top[layer], value=0.1)]},
        "gated by another feature": {
            "interventions": [one("clamp", [a], value=30.0, when={"sae": sae, "feature": b, "below": 0.5})]
        },
        "gated by token": {"interventions": [one("clamp", [a], value=40.0, when={"token_in": real.prompt[3:6]})]},
        "ranges, without the first token": {
            "interventions": [one("clamp", [a], value=30.0, positions={"ranges": [[0, 3], [12, 20]]}, skip_bos=True)]
        },
        "prompt only": {"interventions": [one("ablate", real.top[layer], positions="prompt")]},
        "two layers": {
            "interventions": [
                one("clamp", [a], value=0.7, units="reference_max"),
                {"sae": other, "features": [c, d], "op": "ablate"},
            ]
        },
        "drop the error": {"interventions": [one("ablate", [a])], "error": "drop"},
        "a limited dose": {
            "interventions": [one("clamp", list(range(10)), value=3.0)],
            "dose": {"limit": 0.3, "on_dose": "scale"},
        },
        "a vector": {"interventions": [{"site": f"resid_post.{layer}", "vector": "v", "op": "add", "value": 6.0}]},
        "a projection clamped": {
            "interventions": [{"site": f"resid_post.{layer}", "vector": "v", "op": "clamp", "value": 5.0}]
        },
        "a direction removed": {"interventions": [{"site": f"resid_post.{layer}", "vector": "v", "op": "ablate"}]},
    }


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_greedy_tokens_equal_the_definition(real: Real, architecture: str) -> None:
    layer, later = LAYERS
    sae, other = f"{architecture}{layer}", f"jumprelu{later}"
    requests = _requests(real, sae, layer, other)
    vector = torch.randn(real.model.config.hidden_size)
    prompts = torch.tensor([real.prompt] * (len(requests) + 1))
    with sae_steer.attach(
        real.model, saes={name: real.folders[name] for name in (sae, other)}, vectors={"v": vector}, whole=[sae]
    ) as steer:
        with steer.rows([None, *requests.values()]) as rows:
            out = real.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW
            )
        completions = out[:, len(real.prompt) :].tolist()
        reports = rows.reports()
        catalog = steer.catalog
    plain = reference_model.generate(real.model64, real.prompt, None, catalog, max_new_tokens=NEW)
    assert completions[0] == plain
    unchanged = []
    for (name, request), completion, report in zip(requests.items(), completions[1:], reports[1:], strict=True):
        expected = reference_model.generate(real.model64, real.prompt, request, catalog, max_new_tokens=NEW)
        assert completion == expected, name
        assert report is not None
        if report["fired"] == 0 or completion == plain:
            unchanged.append(name)
    # A case whose edit does nothing shows nothing; the definition itself must differ from the plain answer.
    assert unchanged == []


@pytest.mark.parametrize("wrong", ["value", "position", "feature"])
def test_a_wrong_request_is_told_apart(real: Real, wrong: str) -> None:
    layer = LAYERS[0]
    sae = f"jumprelu{layer}"
    a, b, *_ = real.top[layer]
    right = {"sae": sae, "features": [a], "op": "clamp", "value": 1.0, "units": "reference_max"}
    spoilt = right | {"value": {"value": 0.0}, "position": {"positions": "prompt"}, "feature": {"features": [b]}}[wrong]
    catalog = Catalog([CatalogSae.make(sae, open_sae(real.folders[sae]))])
    answers = [
        reference_model.generate(real.model64, real.prompt, {"interventions": [i]}, catalog, max_new_tokens=NEW)
        for i in (right, spoilt)
    ]
    assert answers[0] != answers[1]
