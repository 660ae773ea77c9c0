"""An SAE trained on the spot on a real model's residual stream, so that tests edit features that mean something there.

A plain TopK autoencoder, some seconds of training; saved once as a TopK and once as a JumpReLU checkpoint of the same
weights (its threshold is the mean of the smallest kept activations, as BatchTopK training would store it).
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

K = 8


@torch.no_grad()
def residuals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], layer: int, length: int = 128
) -> Tensor:
    """Residual stream after ``layer``, first tokens left out: ``[N, D]``."""
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        rows.append(model(**ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:])
    return torch.cat(rows)


def train(x: Tensor, features: int, *, steps: int = 400, batch: int = 1024, seed: int = 0) -> dict[str, Tensor]:
    """Trains a TopK autoencoder on ``x [N, D]``; returns the tensors of a SAELens checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    centre = x.mean(dim=0)
    directions = x[torch.randint(len(x), (features,), generator=generator)] - centre
    dec = functional.normalize(directions, dim=1).requires_grad_()
    enc = dec.detach().T.clone().requires_grad_()
    b_enc, b_dec = torch.zeros(features, requires_grad=True), centre.clone().requires_grad_()
    optimiser = torch.optim.Adam([dec, enc, b_enc, b_dec], lr=3e-3)
    threshold = torch.tensor(0.0)
    for _ in range(steps):
        rows = x[torch.randint(len(x), (batch,), generator=generator)]
        top = torch.topk((rows - b_dec) @ enc + b_enc, K, dim=1)
        codes = torch.zeros(batch, features).scatter(1, top.indices, top.values.relu())
        loss = (codes @ dec + b_dec - rows).pow(2).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        threshold = 0.95 * threshold + 0.05 * top.values[:, -1].detach().clamp_min(0).mean()
    return {
        "W_enc": enc.detach().contiguous(),
        "W_dec": dec.detach().contiguous(),
        "b_enc": b_enc.detach(),
        "b_dec": b_dec.detach(),
        "threshold": torch.full((features,), float(threshold)),
    }


def save(tensors: dict[str, Tensor], folder: Path, *, architecture: str, layer: int, maxima: Tensor) -> Path:
    """Writes a SAELens folder with ``features.json``; ``maxima [F]`` are the recorded maxima."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: t for name, t in tensors.items() if name != "threshold" or architecture == "jumprelu"}
    save_file(kept, folder / "sae_weights.safetensors")
    d_in, d_sae = tensors["W_enc"].shape
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"},
    } | ({"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {})
    (folder / "cfg.json").write_text(json.dumps(config))
    labels = {str(i): {"label": None, "reference_max": float(m)} for i, m in enumerate(maxima) if m > 0}
    (folder / "features.json").write_text(json.dumps({"features": labels}))
    return folder


def activations(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """JumpReLU activations ``[N, F]`` of ``x [N, D]``."""
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    return pre.relu() * (pre > tensors["threshold"])
