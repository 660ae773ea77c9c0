"""The first path: the definition, in float64, with what an ``applied`` block says counted from its own words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sae_steer.catalog import Catalog
from sae_steer.families import locate
from sae_steer.reference import Token, at_position, edit_token, encode, gate_holds, interventions, new_value
from sae_steer.schema import (
    FeatureValueEdit,
    Intervention,
    VectorAblateEdit,
    VectorScaleEdit,
    VectorValueEdit,
    parse_steering,
)
from sae_steer.sites import Site
from tests import reference_model
from tests.conformance.answers import Asked, Choice, Expected
from tests.conformance.asks import Ask, Case
from tests.conformance.catalog import PROMPTS, SITES
from tests.conformance.read_definition import read_by_definition
from tests.steered_models import SteeredModel

_VECTORS = VectorValueEdit | VectorScaleEdit | VectorAblateEdit


@dataclass
class _Greedy:
    """An answer by the definition.

    Args:
        tokens: Completion.
        logprobs: ``[n]`` of its tokens.
        margin: The smallest distance between the two best logits.
        sites: For each site ``[P + n - 1, D]``, what is read there, before any edit.
    """

    tokens: list[int]
    logprobs: list[float]
    margin: float
    sites: dict[Site, Tensor]


@dataclass
class Definition:
    """Answers cases by the definition.

    Args:
        model: The model.
        catalog: What names mean.
    """

    model: SteeredModel
    catalog: Catalog
    _known: dict[str, _Greedy] = field(default_factory=dict)
    caches: bool = False

    def resolve(self, case: Case) -> list[list[Asked]]:
        """A case's requests, with the answers of earlier ones in their prompts."""
        waves: list[list[Asked]] = []
        for wave in case.waves:
            waves.append([self._resolve(ask, waves) for ask in wave])
        return waves

    def _resolve(self, ask: Ask, before: list[list[Asked]]) -> Asked:
        chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(PROMPTS[ask.prompt])]
        prompt: Any = self.model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        ids: list[int] = prompt["input_ids"][: ask.first]
        if ask.after is not None:
            earlier = before[ask.after][0]
            ids = earlier.prompt + self._greedy(earlier.prompt, earlier.steering, earlier.tokens).tokens + ids[1:]
        return Asked(ids, ask.steering, ask.tokens, ask.choices, ask.fails is not None)

    def expected(self, case: Case) -> list[list[Expected]]:
        """What every path must answer."""
        return [
            [self._expected(ask, each) for ask, each in zip(wave, each_wave, strict=True)]
            for wave, each_wave in zip(case.waves, self.resolve(case), strict=True)
        ]

    def run(self, waves: list[list[Asked]], *, wrong: str | None = None, cold: bool = True) -> list[list[list[Choice]]]:
        """As any other path."""
        del wrong, cold
        return [[[self._choice(each)] * each.choices for each in wave] for wave in waves]

    def _choice(self, asked: Asked) -> Choice:
        found = self._greedy(asked.prompt, asked.steering, asked.tokens)
        applied, failed = self._applied(asked, found, 0)
        read = read_by_definition(asked, found.tokens, found.sites, self.catalog)
        return Choice(found.tokens, found.logprobs, applied, "dose_exceeded" if failed else None, read=read)

    def _expected(self, ask: Ask, asked: Asked) -> Expected:
        return replace(self.expect(asked), error=ask.fails, cached=ask.cached)

    def expect(self, asked: Asked) -> Expected:
        """What every path must answer to a request that is no case's."""
        found = self._greedy(asked.prompt, asked.steering, asked.tokens)
        return Expected(
            found.tokens,
            found.logprobs,
            found.margin,
            self._greedy(asked.prompt, None, asked.tokens).tokens,
            None,
            lambda cached: self._applied(asked, found, cached)[0],
            None,
            read_by_definition(asked, found.tokens, found.sites, self.catalog),
        )

    def _greedy(self, prompt: Sequence[int], steering: dict[str, Any] | None, tokens: int) -> _Greedy:
        key = json.dumps([prompt, steering, tokens])
        if key not in self._known:
            self._known[key] = self._generate(prompt, steering, tokens)
        return self._known[key]

    def _generate(self, prompt: Sequence[int], steering: dict[str, Any] | None, tokens: int) -> _Greedy:
        model = self.model.model64
        logits: list[Tensor] = []
        reads: dict[Site, Tensor] = {}
        handles = [model.register_forward_hook(lambda _, args, output: logits.append(output.logits[0, -1]))]
        for site in self._sites():
            handles.append(_watch(model, site, reads))  # first: hooks are called in order, and these read
        try:
            found = reference_model.generate(
                model, prompt, steering, self.catalog, max_new_tokens=tokens, stop=[model.config.eos_token_id]
            )
        finally:
            for handle in handles:
                handle.remove()
        best = torch.stack(logits).topk(2).values
        logprobs = [float(row.log_softmax(-1)[token]) for row, token in zip(logits, found, strict=True)]
        return _Greedy(found, logprobs, float((best[:, 0] - best[:, 1]).min()), reads)

    def _sites(self) -> tuple[Site, ...]:
        return self.catalog.sites([Site.parse(site) for site in SITES])

    def _applied(self, asked: Asked, found: _Greedy, cached: int) -> tuple[dict[str, Any] | None, bool]:
        """The ``applied`` block over the positions from ``cached`` on, and whether the request must fail."""
        if asked.steering is None:
            return None, False
        steering = parse_steering(asked.steering)
        bos = self.model.model.config.bos_token_id
        ids = asked.prompt + found.tokens[:-1]
        tokens = [Token(p, len(asked.prompt), ids[p], bos) for p in range(cached, len(ids))]
        edits = interventions(steering, self.catalog)
        sites = [site for site in self._sites() if any(self._site(each) == site for each in edits)]
        features, doses, over = [], [], 0
        touched: set[int] = set()
        for site in sites:
            here = [each for each in edits if self._site(each) == site]
            features += [entry for each in here for entry in self._features(each, site, tokens, found)]
            for token in tokens:
                if any(at_position(each, token) for each in here):
                    x = found.sites[site][token.position]
                    edited = edit_token(x, x, site, token, steering, self.catalog)
                    doses.append(edited.dose)
                    over += edited.over
                    touched.add(token.position)
        block = {
            "sites": [str(site) for site in sites],
            "features": sorted(features, key=_order),
            "tokens": len(touched),
            "fired": sum(entry["fired"] for entry in features),
            "dose": {"max": max(doses, default=0.0), "mean": sum(doses) / max(len(doses), 1), "limited": over},
        }
        fails = steering.dose is not None and steering.dose.on_dose == "fail"
        return block, over > 0 and fails

    def _site(self, edit: Intervention) -> Site:
        return Site.parse(edit.site) if isinstance(edit, _VECTORS) else self.catalog.sae(edit.sae).site

    def _features(
        self, edit: Intervention, site: Site, tokens: Sequence[Token], found: _Greedy
    ) -> list[dict[str, Any]]:
        """The entries of one intervention."""
        held = [token for token in tokens if at_position(edit, token)]
        entries = []
        for n, feature in enumerate([-1] if isinstance(edit, _VECTORS) else edit.features):  # type: ignore[union-attr]
            before, after = [], []
            for token in held:
                x = found.sites[site][token.position]
                f = self._activation(edit, feature, x)
                before.append(f)
                after.append(
                    new_value(edit, n, f, self._unit(edit, feature, x)) if gate_holds(edit, x, self.catalog) else f
                )
            if isinstance(edit, _VECTORS):
                named: dict[str, Any] = {"vector": edit.vector}
                named["fingerprint"] = self.catalog.vector(edit.vector).fingerprint
            else:
                named = {"sae": edit.sae, "feature": feature}
                named["fingerprint"] = self.catalog.sae(edit.sae).sae.fingerprint
            entries.append(
                {"site": str(site)}
                | named
                | {
                    "op": edit.op,
                    "tokens": len(held),
                    "fired": sum(a != b for a, b in zip(before, after, strict=True)),
                    "mean_before": sum(before) / max(len(held), 1),
                    "mean_after": sum(after) / max(len(held), 1),
                }
            )
        return entries

    def _activation(self, edit: Intervention, feature: int, x: Tensor) -> float:
        if not isinstance(edit, _VECTORS):
            return float(encode(self.catalog.sae(edit.sae).sae, x)[feature])
        if edit.op == "add":
            return 0.0  # a direction that is added as it is reads nothing
        direction = self.catalog.vector(edit.vector).values.double()
        return float(direction @ x / direction.norm())

    def _unit(self, edit: Intervention, feature: int, x: Tensor) -> float:
        units = getattr(edit, "units", "raw")
        if units == "residual_norm":
            return float(x.norm())
        if isinstance(edit, FeatureValueEdit) and units == "reference_max":
            labels = self.catalog.sae(edit.sae).labels
            assert labels is not None
            label = labels.get(feature)
            assert label is not None
            assert label.reference_max is not None
            return label.reference_max
        return 1.0


def _order(entry: dict[str, Any]) -> Any:
    return Site.parse(entry["site"]).write.order, entry.get("feature", -1)


def _watch(model: nn.Module, site: Site, reads: dict[Site, Tensor]) -> Any:
    """Keeps what is read at a site in the last forward pass, ``[T, D]``."""
    module, side = locate(model, site.read)

    def keep(x: Any) -> None:
        reads[site] = (x if isinstance(x, Tensor) else x[0])[0].clone()

    if side == "input":
        return module.register_forward_pre_hook(lambda _, args: keep(args[0]))
    return module.register_forward_hook(lambda _, args, output: keep(output))
