"""Small checkpoints as OpenAI published them for GPT-2 small."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws


def write_openai(
    root: Path,
    *,
    place: str = "resid_post_mlp_v5_32k",
    layer: int = 3,
    topk: bool = True,
    k: int | Tensor = 4,
    d_in: int = 16,
    n_features: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shuffled: bool = False,
    values: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Writes ``<place>/autoencoders/<layer>.pt``; returns the file and what is in it."""
    normal = draws(seed, torch.float64)
    made = {
        "pre_bias": normal(d_in, scale=0.5),
        "latent_bias": normal(n_features, scale=0.3),
        "encoder.weight": normal(n_features, d_in, scale=d_in**-0.5),
        "decoder.weight": normal(d_in, n_features, scale=d_in**-0.5),
    }
    stored: dict[str, Any] = {
        **cast(made, dtype, shuffled),
        "stats_last_nonzero": torch.zeros(n_features, dtype=torch.long),
        "latents_activation_frequency": torch.ones(n_features),
        "latents_mean_square": torch.zeros(n_features),
        "activation": "TopK" if topk else "ReLU",
    }
    if topk:
        stored["activation_state_dict"] = {"k": k, "postact_fn": "ReLU"}
    path = root / place / "autoencoders" / f"{layer}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = changed(stored, values)
    torch.save(stored, path)
    return path, stored
