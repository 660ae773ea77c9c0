"""Small checkpoints in the two layouts of OpenMOSS: Llama Scope of 2024, and what their library writes now."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws

HOOK = "blocks.3.hook_resid_post"


def write_llama_scope(
    folder: Path,
    *,
    d_in: int = 16,
    n_features: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shuffled: bool = False,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes ``hyperparams.json`` and ``checkpoints/final.safetensors``; returns the tensors as they are stored."""
    normal = draws(seed, torch.float64)
    settings = {
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": n_features / d_in,
        "d_model": d_in,
        "d_sae": n_features,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.52734375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 2.5, "out": 2.5},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 4,
        "lr": 8e-4,
    }
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps(changed(settings, config)))
    made = {
        "encoder.weight": normal(n_features, d_in, scale=d_in**-0.5),
        "encoder.bias": normal(n_features, scale=0.3),
        "decoder.weight": normal(d_in, n_features, scale=d_in**-0.5),
        "decoder.bias": normal(d_in, scale=0.5),
    }
    kept = changed(cast(made, dtype, shuffled), tensors)
    save_file(kept, folder / "checkpoints" / "final.safetensors")
    return kept


def write_openmoss(
    folder: Path,
    *,
    layout: str = "new",
    file: str = "sae_weights.safetensors",
    act_fn: str = "jumprelu",
    norm_activation: str = "dataset-wise",
    d_in: int = 16,
    n_features: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shuffled: bool = False,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes ``config.json`` and the weights, in the layout of now or of 2025 (``old``); returns the tensors."""
    normal = draws(seed, torch.float64)
    settings = {
        "sae_type": "sae",
        "d_model": d_in,
        "expansion_factor": n_features / d_in,
        "use_decoder_bias": True,
        "act_fn": act_fn,
        "norm_activation": norm_activation,
        "sparsity_include_decoder_norm": True,
        "top_k": 4,
        "use_triton_kernel": False,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "use_glu_encoder": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changed(settings, config)))
    made = {
        "W_E": normal(d_in, n_features, scale=d_in**-0.5),
        "b_E": normal(n_features, scale=0.3),
        "W_D": normal(n_features, d_in, scale=d_in**-0.5),
        "b_D": normal(d_in, scale=0.5),
    }
    threshold = normal(n_features, scale=0.5) - 1
    if layout == "old":
        made = {
            "encoder.weight": made["W_E"].T,
            "encoder.bias": made["b_E"],
            "decoder.weight": made["W_D"].T,
            "decoder.bias": made["b_D"],
        }
    if act_fn == "jumprelu":
        made[{"new": "activation_function.log_jumprelu_threshold", "old": "log_jumprelu_threshold"}[layout]] = threshold
    norm = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(2.5)}
    kept = changed(norm | cast(made, dtype, shuffled), tensors)
    if file.endswith(".pt"):
        torch.save({"sae": kept, "version": "2.0.0"}, folder / file)
    else:
        save_file({name: tensor.clone() for name, tensor in kept.items()}, folder / file)
    return kept
