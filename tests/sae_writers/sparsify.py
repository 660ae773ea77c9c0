"""EleutherAI's sparsify: a folder for each hookpoint, and the run's configuration above it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.sae_writers.changes import changed
from tests.sae_writers.draws import draws


def write_sparsify(
    root: Path,
    hookpoint: str = "layers.3",
    *,
    d_in: int = 16,
    expansion: int = 2,
    num_latents: int = 0,
    k: int = 4,
    transcode: bool = False,
    skip: bool = False,
    old: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    model: str | None = "EleutherAI/pythia-160m",
    cfg: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a hookpoint's folder below ``root``, and returns it.

    Args:
        root: The run's folder.
        hookpoint: A module's path.
        d_in: D.
        expansion: F / D, where ``num_latents`` is 0.
        num_latents: F.
        k: Of TopK.
        transcode: Whether it is a transcoder.
        skip: Whether it has a skip connection.
        old: As before February 2025: ``cfg.json`` knows neither ``activation`` nor ``transcode``.
        seed: Of the weights.
        dtype: Of the stored tensors.
        model: As in the run's configuration; None = that is missing.
        cfg: More keys of cfg.json, over the others.
        tensors: More tensors, over the others.
    """
    features, normal = num_latents or d_in * expansion, draws(seed, dtype)
    made = {
        "encoder.weight": normal(features, d_in, scale=d_in**-0.5),
        "encoder.bias": normal(features, scale=0.3),
        "W_dec": normal(features, d_in, scale=d_in**-0.5),
        "b_dec": normal(d_in, scale=0.5),
    }
    if skip:
        made["W_skip"] = normal(d_in, d_in, scale=0.1)
    folder = root / hookpoint
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = changed(made, tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in kept.items()}, folder / "sae.safetensors")
    said: dict[str, Any] = {
        "expansion_factor": expansion,
        "normalize_decoder": True,
        "num_latents": num_latents,
        "k": k,
        "multi_topk": False,
        "skip_connection": skip,
        "d_in": d_in,
    }
    if not old:
        said |= {"activation": "topk", "transcode": transcode}
    (folder / "cfg.json").write_text(json.dumps(changed(said, cfg)), encoding="utf-8")
    if model is not None:
        run = {"model": model, "hookpoints": [hookpoint], "ctx_len": 2048} | ({"transcode": transcode} if old else {})
        (root / "config.json").write_text(json.dumps(run), encoding="utf-8")
    return folder
