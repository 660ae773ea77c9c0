"""dictionary_learning, class by class: the state dicts that its modules have, and the configuration of a trainer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sae_writers.changes import changed
from tests.sae_writers.draws import draws

CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "MatroyshkaBatchTopKSAE",
)


def write_dictionary_learning(
    folder: Path,
    *,
    dict_class: str = "AutoEncoder",
    d_in: int = 16,
    n_features: int = 32,
    k: int = 4,
    threshold: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    file: str = "ae.pt",
    trainer: Mapping[str, Any] | None = None,
    with_config: bool = True,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes one trainer's folder; ``file`` may be in ``checkpoints/``. Returns the tensors."""
    made = _tensors(dict_class, d_in, n_features, k, threshold, seed, dtype)
    kept = changed(made, tensors)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(kept, path)
    if with_config:
        said = {
            "trainer_class": "Trainer",
            "dict_class": dict_class,
            "activation_dim": d_in,
            "dict_size": n_features,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m",
            "submodule_name": "resid_post_layer_3",
        }
        if "k" in made:
            said["k"] = k
        config = {"trainer": changed(said, trainer), "buffer": {"d_submodule": d_in, "ctx_len": 128}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return kept


def _tensors(
    dict_class: str, d_in: int, n_features: int, k: int, threshold: float, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    normal = draws(seed, dtype)
    enc, dec = normal(n_features, d_in, scale=d_in**-0.5), normal(d_in, n_features, scale=d_in**-0.5)
    b_enc, b_dec = normal(n_features, scale=0.3), normal(d_in, scale=0.5)
    linear = {"encoder.weight": enc, "encoder.bias": b_enc, "decoder.weight": dec}
    matrix = {"W_enc": enc.T.clone(), "b_enc": b_enc, "W_dec": dec.T.clone(), "b_dec": b_dec}
    buffers = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(threshold)}
    match dict_class:
        case "AutoEncoder":
            return {"bias": b_dec, **linear}
        case "AutoEncoderNew":
            return {**linear, "decoder.bias": b_dec}
        case "GatedAutoEncoder":
            return {
                "decoder_bias": b_dec,
                "r_mag": normal(n_features, scale=0.4),
                "gate_bias": normal(n_features, scale=0.3),
                "mag_bias": normal(n_features, scale=0.3),
                "encoder.weight": enc,
                "decoder.weight": dec,
            }
        case "JumpReluAutoEncoder":
            return {**matrix, "threshold": normal(n_features, scale=0.4).abs()}
        case "AutoEncoderTopK" | "BatchTopKSAE":
            return {"b_dec": b_dec, **buffers, **linear}
        case "MatryoshkaBatchTopKSAE" | "MatroyshkaBatchTopKSAE":
            groups = torch.tensor([n_features // 4, n_features - n_features // 4])
            return {**matrix, **buffers, "group_sizes": groups}
    return {"bias": b_dec, **linear}
