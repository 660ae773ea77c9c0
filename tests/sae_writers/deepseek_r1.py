"""A small checkpoint in the layout of qresearch's SAE of DeepSeek-R1."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import cast, changed
from tests.sae_writers.draws import draws

NAME = "DeepSeek-R1-Distill-Llama-8B-SAE-l19"


def write_deepseek_r1(
    folder: Path,
    *,
    name: str = f"{NAME}.pt",
    d_in: int = 16,
    n_features: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shuffled: bool = False,
    tensors: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Tensor]]:
    """Writes one ``.pt``; returns the file and its tensors."""
    normal = draws(seed, torch.float64)
    made = {
        "encoder.weight": normal(n_features, d_in, scale=d_in**-0.5),
        "encoder.bias": normal(n_features, scale=0.3),
        "decoder.weight": normal(d_in, n_features, scale=d_in**-0.5),
        "decoder.bias": normal(d_in, scale=0.5),
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = changed(cast(made, dtype, shuffled), tensors)
    torch.save(stored, folder / name)
    return folder / name, stored
