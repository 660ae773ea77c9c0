"""Models that mean something, with dictionaries that mean something on them, for tests that compare answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sae_steer import embedded, reference
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.sae import open_sae
from tests import real_sae, reference_model

STORY = "Once upon a time, there was a little girl named Lily. She"


@dataclass(frozen=True)
class SteeredModel:
    """A model, its float64 twin, a dictionary on it, and a prompt with the features that fire there.

    Args:
        folder: The model's files.
        sae_folder: The dictionary's files.
        sae: The dictionary's name in requests.
        prompt: Token ids.
        firing: Features by how strongly they fire on the prompt, strongest first.
    """

    folder: Path
    sae_folder: Path
    sae: str
    model: PreTrainedModel
    model64: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    catalog: Catalog
    prompt: list[int]
    firing: list[int]

    def edit(self, features: list[int], op: str, **more: Any) -> dict[str, Any]:
        """An intervention on the dictionary."""
        return {"sae": self.sae, "features": features, "op": op, **more}

    def clamp(self, feature: int, value: float = 1.0) -> dict[str, Any]:
        """A request that clamps a feature to a multiple of its recorded maximum."""
        return {"interventions": [self.edit([feature], "clamp", value=value, units="reference_max")]}

    def expected(self, request: dict[str, Any] | None, tokens: int) -> list[int]:
        """Greedy completion by the definition, in float64, up to and with the end of sequence."""
        ends = self.model.generation_config.eos_token_id
        stop = ends if isinstance(ends, list) else [ends]
        return reference_model.generate(
            self.model64, self.prompt, request, self.catalog, max_new_tokens=tokens, stop=stop
        )

    def text(self, tokens: list[int]) -> str:
        """Text of a completion: what it adds to the text of the prompt."""
        before = self.tokenizer.decode(self.prompt, skip_special_tokens=True)
        return str(self.tokenizer.decode([*self.prompt, *tokens], skip_special_tokens=True))[len(before) :]


@torch.no_grad()
def all_features(steered: SteeredModel, text: str) -> torch.Tensor:
    """``[T, F]`` float64: the whole dictionary on a text, by the definition."""
    entry = steered.catalog.saes[steered.sae]
    ids = steered.tokenizer(text)["input_ids"]
    states = steered.model64(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.stack([reference.encode(entry.sae, x) for x in states[entry.site.read.layer + 1][0]])


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _firing(model: PreTrainedModel, catalog: Catalog, name: str, prompt: list[int]) -> list[int]:
    entry = catalog.saes[name]
    rows = entry.sae.rows(range(entry.sae.spec.n_features))
    hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[entry.site.read.layer + 1][0, 1:]
    pre = hidden @ rows.enc.T + rows.bias
    f = pre.relu() * (pre > rows.theta)
    return f.sum(dim=0).argsort(descending=True)[:32].tolist()


def _steered(folder: Path, sae_folder: Path, sae: str, prompt: str | None) -> SteeredModel:
    model, tokenizer = _load(folder)
    catalog = Catalog([CatalogSae.make(sae, open_sae(sae_folder), whole=True)])
    if prompt is not None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        chat = [{"role": "user", "content": "Tell me about the sea."}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    firing = _firing(model, catalog, sae, ids)
    twin = reference_model.in_float64(model)
    return SteeredModel(folder, sae_folder, sae, model, twin, tokenizer, catalog, ids, firing)


def story_model(assets: Path, work: Path, *, layer: int = 2) -> SteeredModel:
    """A published model of children's stories, with a dictionary trained on the spot."""
    folder = assets / "models" / "stories260k"
    model, tokenizer = _load(folder)
    with (assets / "data" / "tinystories_2k.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(200), strict=False)]
    x = real_sae.residuals(model, tokenizer, texts, layer)
    tensors = real_sae.train(x, 256, steps=250)
    maxima = real_sae.activations(tensors, x).amax(dim=0)
    real_sae.save(tensors, work / "story", architecture="jumprelu", layer=layer, maxima=maxima)
    return _steered(folder, work / "story", "story", STORY)


def comment_model(assets: Path, work: Path, texts: Sequence[str], *, layer: int = 3) -> SteeredModel:
    """A small model of mixed text, comments among it, with a dictionary trained on the spot on some texts."""
    folder = assets / "models" / "mixed-3m"
    model, tokenizer = _load(folder)
    x = real_sae.residuals(model, tokenizer, texts, layer)
    tensors = real_sae.train(x, 512, steps=300)
    maxima = real_sae.activations(tensors, x).amax(dim=0)
    real_sae.save(tensors, work / "comments", architecture="jumprelu", layer=layer, maxima=maxima)
    return _steered(folder, work / "comments", "res", texts[0])


def embedded_model() -> SteeredModel:
    """The model that ships with the package, with its own dictionary, on a chat."""
    return _steered(embedded.MODEL, embedded.SAE, embedded.SAE_NAME, None)
