"""Small SAE checkpoints on disk, in every layout that is read: random numbers in real layouts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SAELENS_ARCHITECTURES = (
    "standard",
    "jumprelu",
    "gated",
    "topk",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
DROP = object()
"""As a value in ``cfg`` or ``tensors``: leave that key out."""


def write_saelens(
    folder: Path,
    *,
    architecture: str = "jumprelu",
    d_in: int = 16,
    n_features: int = 32,
    d_out: int | None = None,
    k: int = 4,
    seed: int = 0,
    version: str = "6",
    dtype: torch.dtype = torch.float32,
    normalize_activations: str | bool = "none",
    apply_b_dec_to_input: bool | None = None,
    hook_name: str | None = None,
    hook_name_out: str | None = "blocks.2.hook_mlp_out",
    activation_fn: str | None = None,
    model_from_pretrained_kwargs: Mapping[str, object] | None = None,
    cfg: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Writes ``cfg.json`` and ``sae_weights.safetensors`` as sae-lens does; makes the folder.

    Args:
        folder: Where to.
        architecture: One of ``SAELENS_ARCHITECTURES``, or any text to be refused.
        d_in: D.
        n_features: F.
        d_out: Written width of a transcoder; None = ``d_in``.
        k: Of TopK.
        seed: Of the weights.
        version: ``"6"`` (nested), ``"5"`` (flat, new names) or ``"2"`` (flat, the oldest names).
        dtype: Of the stored tensors.
        normalize_activations: As in cfg.json.
        apply_b_dec_to_input: As in cfg.json; None = the architecture's default.
        hook_name: TransformerLens name of the place read; None = layer 2, residual stream or MLP input.
        hook_name_out: Of the place written; transcoders only.
        activation_fn: Before version 6; None = the architecture's own.
        model_from_pretrained_kwargs: As in cfg.json.
        cfg: More keys of cfg.json, over the others; ``DROP`` removes one.
        tensors: More tensors, over the others; ``DROP`` removes one.

    Returns:
        The tensors as written.
    """
    transcoder = architecture.endswith("transcoder")
    hook_name = hook_name or ("blocks.2.mlp.hook_in" if transcoder else "blocks.2.hook_resid_post")
    subtracts = not transcoder if apply_b_dec_to_input is None else apply_b_dec_to_input
    core: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": n_features,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": normalize_activations,
        "reshape_activations": "hook_z" if hook_name.endswith("hook_z") else "none",
    }
    model_side: dict[str, Any] = {
        "model_name": "tiny",
        "hook_name": hook_name,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "none",
        "model_from_pretrained_kwargs": dict(model_from_pretrained_kwargs or {}),
    }
    if transcoder:
        core["d_out"] = d_out or d_in
        model_side["hook_name_out"] = hook_name_out
    folder.mkdir(parents=True, exist_ok=True)
    written = _saelens_cfg(core, model_side, version, k, activation_fn)
    written = {key: value for key, value in {**written, **(cfg or {})}.items() if value is not DROP}
    (folder / "cfg.json").write_text(json.dumps(written), encoding="utf-8")

    made = _saelens_tensors(architecture, d_in, n_features, core.get("d_out", d_in), seed)
    made = {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}
    # Clones: the format refuses tensors that share memory.
    kept = {name: tensor.clone() for name, tensor in {**made, **(tensors or {})}.items() if tensor is not DROP}
    save_file(kept, folder / "sae_weights.safetensors")
    return kept


def write_labels(folder: Path, features: Mapping[int, tuple[str | None, float | None]]) -> None:
    """Writes ``features.json``: label and reference maximum by feature."""
    entries = {str(i): {"label": label, "reference_max": high} for i, (label, high) in features.items()}
    (folder / "features.json").write_text(json.dumps({"features": entries}), encoding="utf-8")


def _saelens_cfg(
    core: dict[str, Any], model_side: dict[str, Any], version: str, k: int, activation_fn: str | None
) -> dict[str, Any]:
    topk = core["architecture"] == "topk"
    if version == "6":
        own = {"k": k, "rescale_acts_by_decoder_norm": False} if topk else {}
        return {**core, **own, "metadata": {**model_side, "sae_lens_version": "6.54.12"}}
    function = activation_fn or ("topk" if topk else "relu")
    flat = {
        **core,
        **model_side,
        "dtype": f"torch.{core['dtype']}",
        "activation_fn_str": function,
        "activation_fn_kwargs": {"k": k} if function == "topk" else {},
        "hook_layer": 2,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": "5.0.0",
    }
    if function == "topk":
        flat["architecture"] = "standard"
    if version == "5":
        return flat
    flat["hook_point"] = flat.pop("hook_name")
    flat["hook_point_head_index"] = flat.pop("hook_head_index")
    for key in ("architecture", "apply_b_dec_to_input", "reshape_activations", "model_from_pretrained_kwargs"):
        default = {"architecture": "standard", "apply_b_dec_to_input": True}.get(key, flat[key])
        if flat[key] == default:
            del flat[key]  # the oldest files leave these to their defaults
    return flat


def _saelens_tensors(architecture: str, d_in: int, n_features: int, d_out: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    tensors = {
        "W_enc": normal(d_in, n_features, scale=d_in**-0.5),
        "W_dec": normal(n_features, d_out, scale=d_out**-0.5),
        "b_dec": normal(d_out, scale=0.5),
    }
    if architecture == "gated":
        for name, scale in (("b_gate", 0.3), ("b_mag", 0.3), ("r_mag", 0.4)):
            tensors[name] = normal(n_features, scale=scale)
    else:
        tensors["b_enc"] = normal(n_features, scale=0.3)
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = normal(n_features, scale=0.4).abs()
    if "skip" in architecture:
        tensors["W_skip"] = normal(d_out, d_in, scale=0.1)
    return tensors
