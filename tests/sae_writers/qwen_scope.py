"""Small checkpoints in the layout of Qwen-Scope."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws

REPOSITORY = "SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"
FEATURES, K = 1024, 50


def write_qwen_scope(
    root: Path,
    *,
    repository: str = REPOSITORY,
    layer: int = 7,
    d_in: int = 16,
    n_features: int = FEATURES,
    dtype: torch.dtype = torch.float32,
    bias: float = 0.0,
    seed: int = 0,
    shuffled: bool = False,
    tensors: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Tensor]]:
    """Writes ``<repository>/layer<n>.sae.pt``, its encoder biases around ``bias``; returns the file and its tensors."""
    normal = draws(seed, torch.float64)
    made = {
        "W_enc": normal(n_features, d_in, scale=d_in**-0.5),
        "W_dec": normal(d_in, n_features, scale=d_in**-0.5),
        "b_enc": normal(n_features, scale=0.3) + bias,
        "b_dec": normal(d_in, scale=0.5),
    }
    path = root / repository / f"layer{layer}.sae.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = changed(cast(made, dtype, shuffled), tensors)
    torch.save(stored, path)
    return path, stored
