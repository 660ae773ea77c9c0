"""Small checkpoints in the layout of sdxl-unbox."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws


def write_sdxl_unbox(
    folder: Path,
    *,
    k: int = 4,
    d_in: int = 16,
    n_features: int = 32,
    wrapped: bool = True,
    statistics: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shuffled: bool = False,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes ``config.json``, ``state_dict.pth`` and, where asked, ``mean.pt`` and ``std.pt``; returns the tensors."""
    normal = draws(seed, torch.float64)
    settings = {"n_dirs_local": n_features, "d_model": d_in, "k": k, "auxk": 8, "dead_steps_threshold": 100}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changed(settings, config)))
    made = {
        "pre_bias": normal(d_in, scale=0.5),
        "latent_bias": normal(n_features, scale=0.3),
        "encoder.weight": normal(n_features, d_in, scale=d_in**-0.5),
        "decoder.weight": normal(d_in, n_features, scale=d_in**-0.5),
    }
    stored = changed(cast(made, dtype, shuffled), tensors)
    state = stored | {"stats_last_nonzero": torch.zeros(n_features, dtype=torch.long)}
    torch.save({"state_dict": state} if wrapped else state, folder / "state_dict.pth")
    if statistics:
        for name in ("mean.pt", "std.pt"):
            torch.save(normal(n_features, scale=1.0).abs(), folder / name)
    return stored
