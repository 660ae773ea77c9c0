"""Where the places of a layer are in vLLM's own model classes: one row a family, checked against the running model.

vLLM passes the residual stream from layer to layer in two parts, ``hidden_states`` and ``residual``, whose sum it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from sae_steer.errors import SiteError
from sae_steer.sites import Kind, Place


class Tap(NamedTuple):
    """A submodule of a layer ("" = the layer itself) and the side of it on which a place is."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of models names its layers and places.

    Args:
        layers: Its list of layers, below the whole model.
        taps: Its places.
    """

    layers: str
    taps: dict[Kind, Tap]


_BLOCK = {Kind.RESID_PRE: Tap("", "input"), Kind.RESID_POST: Tap("", "output")}
_LLAMA = Family(
    "model.layers",
    _BLOCK
    | {
        Kind.Z: Tap("self_attn.o_proj", "input"),
        Kind.ATTN_OUT: Tap("self_attn", "output"),
        Kind.RESID_MID: Tap("post_attention_layernorm", "input"),
        Kind.MLP_IN: Tap("mlp", "input"),
        Kind.MLP_OUT: Tap("mlp", "output"),
    },
)
_MIXTRAL = Family(
    "model.layers",
    _LLAMA.taps | {Kind.MLP_IN: Tap("block_sparse_moe", "input"), Kind.MLP_OUT: Tap("block_sparse_moe", "output")},
)
# Attention and MLP outputs pass a norm before they are added: the places are behind it, as the published SAEs have it.
_GEMMA2 = Family(
    "model.layers",
    _BLOCK
    | {
        Kind.Z: Tap("self_attn.o_proj", "input"),
        Kind.ATTN_OUT: Tap("post_attention_layernorm", "output"),
        Kind.RESID_MID: Tap("pre_feedforward_layernorm", "input"),
        Kind.MLP_IN: Tap("mlp", "input"),
        Kind.MLP_OUT: Tap("post_feedforward_layernorm", "output"),
    },
)
_GPT2 = Family(
    "transformer.h",
    _BLOCK
    | {
        Kind.Z: Tap("attn.c_proj", "input"),
        Kind.ATTN_OUT: Tap("attn", "output"),
        Kind.RESID_MID: Tap("ln_2", "input"),
        Kind.MLP_IN: Tap("mlp", "input"),
        Kind.MLP_OUT: Tap("mlp", "output"),
    },
)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Phi3ForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2MoeForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _GPT2,
}
"""By the name of vLLM's model class."""


def family_of(model: nn.Module) -> Family:
    """The family of a running model; raises :class:`SiteError` for a class that is not in the table."""
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        raise SiteError(f"vLLM's {name} has no table of places yet. Known: {', '.join(FAMILIES)}.")
    return family


def locate(model: nn.Module, place: Place) -> tuple[nn.Module | None, Literal["input", "output"]]:
    """The submodule at a place, and on which side of it the place is.

    Returns:
        None for the submodule where the layer runs in another stage of a pipeline.

    Raises:
        SiteError: The family is not known, the model has no such layer, or its layers have no such place.
    """
    family = family_of(model)
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)  # a wrong row of the table above, not a user's fault
    if place.layer >= len(layers):
        raise SiteError(f"There is no {place}: the model has layers 0 to {len(layers) - 1}.")
    tap = family.taps.get(place.kind)
    if tap is None:
        known = ", ".join(family.taps)
        raise SiteError(f"vLLM's {type(model).__name__} has no place {place}. Known: {known}.")
    layer = layers[place.layer]
    if type(layer).__name__ == "PPMissingLayer":
        return None, tap.side
    try:
        return layer.get_submodule(tap.module), tap.side
    except AttributeError:
        raise SiteError(f"{place}: this layer of vLLM's {type(model).__name__} has no {tap.module!r}.") from None
