"""Greedy generation by the definition: the whole sequence anew for each token, in float64, edited token by token."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_steer.catalog import Catalog
from sae_steer.families import locate
from sae_steer.reference import Token, edit_tokens
from sae_steer.schema import Steering, parse_steering
from sae_steer.sites import Site


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in float64, with the plainest attention there is."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin.eval()


def _hook(
    model: PreTrainedModel, site: Site, steering: Steering, catalog: Catalog, ids: Sequence[int], prompt: int, bos: int
) -> list[Any]:
    tokens = [Token(p, prompt, token, bos) for p, token in enumerate(ids)]
    kept: list[Tensor] = []

    def edited(y: Tensor) -> Tensor:
        x = kept.pop() if kept else y
        return edit_tokens(x[0], y[0], site, tokens, steering, catalog)[None]

    def on_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        # In place: at resid_mid, the residual connection around the MLP has taken the same tensor already.
        args[0].copy_(edited(args[0]))

    def on_output(_: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return edited(output) if isinstance(output, Tensor) else (edited(output[0]), *output[1:])

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: object = None) -> None:
        kept.append(args[0].clone())

    module, side = locate(model, site.write)
    handles = [
        module.register_forward_pre_hook(on_input) if side == "input" else module.register_forward_hook(on_output)
    ]
    if site.read != site.write:
        reader, read_side = locate(model, site.read)
        assert read_side == "input"
        handles.append(reader.register_forward_pre_hook(keep))
    return handles


@torch.no_grad()
def generate(
    model64: PreTrainedModel,
    prompt: Sequence[int],
    steering: dict[str, Any] | None,
    catalog: Catalog,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
) -> list[int]:
    """The completion's token ids; ``model64`` comes from :func:`in_float64`."""
    ids = list(prompt)
    request = parse_steering(steering or {})
    bos = model64.config.bos_token_id
    sites = {entry.site for entry in catalog.saes.values()} | {
        Site.parse(i.site) for i in request.interventions if hasattr(i, "site")
    }
    for _ in range(max_new_tokens):
        handles = [handle for site in sites for handle in _hook(model64, site, request, catalog, ids, len(prompt), bos)]
        try:
            logits = model64(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        ids.append(int(logits.argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]
