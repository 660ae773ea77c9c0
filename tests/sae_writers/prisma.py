"""Small checkpoints in the layout of Prisma's SAEs of vision transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws


def write_prisma(
    folder: Path,
    *,
    architecture: str = "standard",
    activation_fn: str = "relu",
    normalize_activations: str = "layer_norm",
    d_out: int | None = None,
    skip: bool = False,
    file: str = "n_images_2600058.pt",
    wrapped: bool = False,
    d_in: int = 16,
    expansion_factor: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shuffled: bool = False,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes ``config.json`` and one ``.pt``, its state under a name where ``wrapped``; returns the tensors.

    With ``d_out`` it is a transcoder, which may have a skip connection.
    """
    normal = draws(seed, torch.float64)
    n_features = d_in * expansion_factor
    settings = {
        "model_class_name": "HookedViT",
        "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "hook_point_layer": 9,
        "layer_subtype": "hook_resid_post",
        "hook_point_head_index": None,
        "d_in": d_in,
        "expansion_factor": expansion_factor,
        "architecture": architecture,
        "activation_fn_str": activation_fn,
        "activation_fn_kwargs": {"k": 4} if activation_fn == "topk" else {},
        "normalize_activations": normalize_activations,
        "cls_token_only": False,
        "use_patches_only": False,
        "is_transcoder": d_out is not None,
        "transcoder_with_skip_connection": skip,
        "out_hook_point_layer": 9,
        "layer_out_subtype": "hook_mlp_out",
        "d_out": 768 if d_out is None else d_out,
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changed(settings, config)))
    made = {
        "W_enc": normal(d_in, n_features, scale=d_in**-0.5),
        "W_dec": normal(n_features, d_out or d_in, scale=d_in**-0.5),
        "b_enc": normal(n_features, scale=0.3),
        "b_dec": normal(d_in, scale=0.5),
    }
    if d_out is not None:
        made["b_dec_out"] = normal(d_out, scale=0.5)
    if skip:
        made["W_skip"] = normal(d_in, d_in, scale=0.1)
    if architecture == "gated":  # its class keeps a b_enc that it never uses
        made |= {name: normal(n_features, scale=0.4) for name in ("b_gate", "b_mag", "r_mag")}
    stored = changed(cast(made, dtype, shuffled), tensors)
    torch.save({"state_dict": stored} if wrapped else stored, folder / file)
    return stored
