"""Where the places of a layer are in Hugging Face models: one row a family, checked against the running model.

A place is the input or the output of a submodule. Families whose attention and MLP outputs pass a norm before they are
added (Gemma 2 and 3) have their places behind that norm, as TransformerLens and the published SAEs have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

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
        layers: Its list of layers, below the model without its head.
        taps: Its places.
    """

    layers: str
    taps: Mapping[Kind, Tap]


_BLOCK = {Kind.RESID_PRE: Tap("", "input"), Kind.RESID_POST: Tap("", "output")}
_LLAMA = Family(
    "layers",
    _BLOCK
    | {
        Kind.Z: Tap("self_attn.o_proj", "input"),
        Kind.ATTN_OUT: Tap("self_attn", "output"),
        Kind.RESID_MID: Tap("post_attention_layernorm", "input"),
        Kind.MLP_IN: Tap("mlp", "input"),
        Kind.MLP_OUT: Tap("mlp", "output"),
    },
)
_GEMMA2 = Family(
    "layers",
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
    "h",
    _BLOCK
    | {
        Kind.Z: Tap("attn.c_proj", "input"),
        Kind.ATTN_OUT: Tap("attn", "output"),
        Kind.RESID_MID: Tap("ln_2", "input"),
        Kind.MLP_IN: Tap("mlp", "input"),
        Kind.MLP_OUT: Tap("mlp", "output"),
    },
)
# Attention and MLP run in parallel on the same residual stream: there is no place between them.
_GPT_NEOX = Family(
    "layers",
    _BLOCK
    | {
        Kind.Z: Tap("attention.dense", "input"),
        Kind.ATTN_OUT: Tap("attention", "output"),
        Kind.MLP_IN: Tap("mlp", "input"),
        Kind.MLP_OUT: Tap("mlp", "output"),
    },
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}


def locate(model: PreTrainedModel, place: Place) -> tuple[nn.Module, Literal["input", "output"]]:
    """The submodule at a place, and on which side of it the place is.

    Raises:
        SiteError: The family is not known, the model has no such layer, or its layers have no such place.
    """
    kind = model.config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise SiteError(f"Models of type {kind!r} have no table of places yet. Known: {', '.join(FAMILIES)}.")
    layers = model.base_model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)  # a wrong row of the table above, not a user's fault
    if place.layer >= len(layers):
        raise SiteError(f"There is no {place}: the model has layers 0 to {len(layers) - 1}.")
    tap = family.taps.get(place.kind)
    if tap is None or (place.kind is Kind.RESID_MID and getattr(model.config, "use_parallel_residual", False)):
        known = ", ".join(kind for kind in family.taps)
        raise SiteError(f"Models of type {kind!r} have no place {place}. Known: {known}.")
    return layers[place.layer].get_submodule(tap.module), tap.side


def width(model: PreTrainedModel, place: Place) -> int:
    """Width of the tensor at a place."""
    config = model.config.get_text_config()
    if place.kind is not Kind.Z:
        return int(config.hidden_size)
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
