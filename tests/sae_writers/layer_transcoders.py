"""Small transcoders in the layout of circuit-tracer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws


def write_layer_transcoder(
    folder: Path,
    *,
    layer: int = 5,
    activation: str = "relu",
    skip: bool = False,
    d_in: int = 16,
    d_out: int = 24,
    n_features: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shuffled: bool = False,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Tensor]]:
    """Writes ``layer_<n>.safetensors`` and ``config.yaml``; returns the file and its tensors."""
    normal = draws(seed, torch.float64)
    made = {
        "W_enc": normal(n_features, d_in, scale=d_in**-0.5),
        "W_dec": normal(n_features, d_out, scale=d_out**-0.5),
        "b_enc": normal(n_features, scale=0.3),
        "b_dec": normal(d_out, scale=0.5),
    }
    if activation == "jumprelu":
        made["activation_function.threshold"] = normal(n_features, scale=0.5).abs()
    if skip:
        made["W_skip"] = normal(d_out, d_in, scale=0.1)
    stored = cast(made, dtype, shuffled)
    if activation == "topk":
        stored["k"] = torch.tensor(4)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_name": "Qwen/Qwen3-4B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "qwen3-4b",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(settings, config)))
    (folder / "wanb-config.yaml").write_text("learning_rate: 0.1\n")
    stored = changed(stored, tensors)
    path = folder / f"layer_{layer}.safetensors"
    save_file(stored, path)
    return path, stored
