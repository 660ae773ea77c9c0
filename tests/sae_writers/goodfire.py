"""Goodfire's two files: a state dict of two linear layers."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import changed
from tests.sae_writers.draws import draws

FILE = "Llama-3.1-8B-Instruct-SAE-l19.pth"


def write_goodfire(
    folder: Path,
    *,
    file: str = FILE,
    d_in: int = 16,
    n_features: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes the file; returns the tensors."""
    normal = draws(seed, dtype)
    made = {
        "encoder_linear.weight": normal(n_features, d_in, scale=d_in**-0.5),
        "encoder_linear.bias": normal(n_features, scale=0.3),
        "decoder_linear.weight": normal(d_in, n_features, scale=d_in**-0.5),
        "decoder_linear.bias": normal(d_in, scale=0.5),
    }
    kept = changed(made, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(kept), folder / file)
    return kept
