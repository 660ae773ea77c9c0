"""Gemma Scope and Gemma Scope 2, as their files are documented."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.sae_writers.changes import changed
from tests.sae_writers.draws import draws

SCOPE = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
SCOPE_2 = "gemma-scope-2-4b-it/resid_post/layer_12_width_16k_l0_small"
TRANSCODER_2 = "gemma-scope-2-4b-it/transcoder_all/layer_12_width_16k_l0_small_affine"


def write_scope(
    folder: Path,
    *,
    d_in: int = 16,
    n_features: int = 32,
    d_out: int | None = None,
    seed: int = 0,
    lower: bool = False,
    compressed: bool = False,
    dtype: type = np.float32,
    arrays: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``params.npz``; ``lower`` spells the matrices with a small w. Returns the archive."""
    made = {name: tensor.numpy().astype(dtype) for name, tensor in _tensors(d_in, n_features, d_out, seed).items()}
    if lower:
        made = {name.replace("W_", "w_"): array for name, array in made.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write = np.savez_compressed if compressed else np.savez
    write(folder / "params.npz", **changed(made, arrays))
    return folder / "params.npz"


def write_scope_2(
    folder: Path,
    *,
    d_in: int = 16,
    n_features: int = 32,
    d_out: int | None = None,
    seed: int = 0,
    affine: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    with_config: bool = True,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes ``params.safetensors`` and, unless told otherwise, ``config.json``; returns the tensors."""
    made = {name.replace("W_", "w_"): t.to(dtype) for name, t in _tensors(d_in, n_features, d_out, seed).items()}
    if affine:
        made["affine_skip_connection"] = draws(seed + 1, dtype)(d_in, d_out or d_in, scale=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.contiguous().clone() for name, tensor in changed(made, tensors).items()}
    save_file(kept, folder / "params.safetensors")
    if with_config:
        layer = "model.layers.12"
        hooks = {"hf_hook_point_in": f"{layer}.output", "hf_hook_point_out": f"{layer}.output"}
        if d_out is not None or affine:
            hooks = {
                "hf_hook_point_in": f"{layer}.pre_feedforward_layernorm.output",
                "hf_hook_point_out": f"{layer}.post_feedforward_layernorm.output",
            }
        said = {"architecture": "jump_relu", "model_name": "google/gemma-3-4b-it", **hooks, "affine_connection": affine}
        (folder / "config.json").write_text(json.dumps(changed(said, config)), encoding="utf-8")
    return kept


def _tensors(d_in: int, n_features: int, d_out: int | None, seed: int) -> dict[str, Tensor]:
    normal, d_out = draws(seed), d_out or d_in
    return {
        "W_enc": normal(d_in, n_features, scale=d_in**-0.5),
        "W_dec": normal(n_features, d_out, scale=d_out**-0.5),
        "b_enc": normal(n_features, scale=0.3),
        "b_dec": normal(d_out, scale=0.5),
        "threshold": normal(n_features, scale=0.4).abs(),
    }
