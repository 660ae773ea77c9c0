"""Random SAEs written by the libraries that people train with, and what those compute with them.

    python tests/oracle/write.py FOLDER

runs where sae-lens, eai-sparsify and dictionary-learning are installed, which none of ours needs (``make oracle``).
Each case is a folder of FOLDER; beside the files of the library it has ``oracle.safetensors``: tokens ``x [T, D]``, and
what the library's own classes make of them in float64, activations ``f [T, F]`` and their decoding ``y [T, D_out]``.
What sae-lens makes of some is in ``sae_lens.json``: it reads them otherwise than those who wrote them.
"""

# pyright: reportMissingImports=false

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sae_lens
import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import load_file, save_file
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder
from torch import Tensor, nn

D, F, D_OUT, K = 24, 64, 40, 6
CASES: dict[str, Callable[[Path], None]] = {}


def fill(module: nn.Module, scale: float = 1.0) -> None:
    """Random numbers for every parameter: nothing stays at zero, or tied."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            drawn = torch.randn(value.shape, dtype=torch.float64) * scale * (0.2 if value.ndim > 1 else 0.4)
            value.copy_((drawn.abs() if name == "threshold" else drawn).to(value.dtype))


def tokens(width: int = D) -> Tensor:
    return torch.randn(48, width, dtype=torch.float64) * 2 + 0.7


def record(folder: Path, x: Tensor, f: Tensor, y: Tensor) -> None:
    values = {"x": x, "f": f.detach(), "y": y.detach()}
    save_file({name: value.contiguous().clone() for name, value in values.items()}, folder / "oracle.safetensors")


# ------------------------------------------------------------------------------------------------- sae-lens


def _lens(name: str, kind: str, **settings: Any) -> None:
    def write(folder: Path) -> None:
        metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="oracle")
        if "ranscoder" in kind:
            metadata = sae_lens.saes.sae.SAEMetadata(
                hook_name="blocks.2.mlp.hook_in", hook_name_out="blocks.2.hook_mlp_out", model_name="oracle"
            )
            settings["d_out"] = D_OUT
        config = getattr(sae_lens, f"{kind}Config")(d_in=D, d_sae=F, metadata=metadata, **settings)
        sae = getattr(sae_lens, kind)(config)
        fill(sae)
        sae.save_model(folder)
        wide = sae.to(torch.float64)
        x = tokens()
        f = wide.encode(x)
        y = wide.decode(f)
        record(folder, x, f.to_dense() if f.is_sparse else f, y)

    CASES[f"sae-lens-{name}"] = write


for _kind in ("Standard", "JumpReLU", "Gated"):
    for _norm in ("none", "layer_norm", "constant_norm_rescale"):
        for _subtract in (True, False):
            _lens(
                f"{_kind}-{_norm}-{_subtract}",
                f"{_kind}SAE",
                normalize_activations=_norm,
                apply_b_dec_to_input=_subtract,
            )
for _rescale in (True, False):
    _lens(f"TopK-{_rescale}", "TopKSAE", k=K, rescale_acts_by_decoder_norm=_rescale)
# Of the skip transcoders, what they decode: their skip connection comes on top, and no edit touches it.
for _kind in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
    _lens(_kind, _kind, apply_b_dec_to_input=False)


def _lens_training(name: str, kind: str, **settings: Any) -> None:
    """What training leaves: an SAE of another architecture, which is saved in its inference form."""

    def write(folder: Path) -> None:
        metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="oracle")
        config = getattr(sae_lens, f"{kind}Config")(d_in=D, d_sae=F, metadata=metadata, **settings)
        sae = getattr(sae_lens, kind)(config)
        fill(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
        sae.save_inference_model(folder)
        inference = sae_lens.SAE.load_from_disk(folder).to(torch.float64)
        x = tokens()
        f = inference.encode(x)
        record(folder, x, f.to_dense() if f.is_sparse else f, inference.decode(f))

    CASES[f"sae-lens-trained-{name}"] = write


_lens_training("Standard", "StandardTrainingSAE", l1_coefficient=1.0)
_lens_training("Gated", "GatedTrainingSAE", l1_coefficient=1.0)
_lens_training("JumpReLU", "JumpReLUTrainingSAE", l0_coefficient=1.0)
_lens_training("TopK", "TopKTrainingSAE", k=K)
_lens_training("TopK-rescaled", "TopKTrainingSAE", k=K, rescale_acts_by_decoder_norm=True)
_lens_training("BatchTopK", "BatchTopKTrainingSAE", k=K)
_lens_training("BatchTopK-rescaled", "BatchTopKTrainingSAE", k=K, rescale_acts_by_decoder_norm=True)
_lens_training("Matryoshka", "MatryoshkaBatchTopKTrainingSAE", k=K, matryoshka_widths=[F // 4, F])


def _lens_scaled(folder: Path) -> None:
    """A checkpoint from the middle of training: the scaling of its input is in a file beside it."""
    from sae_lens.training.activation_scaler import ActivationScaler

    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="oracle")
    config = sae_lens.StandardSAEConfig(
        d_in=D, d_sae=F, metadata=metadata, normalize_activations="expected_average_only_in"
    )
    sae = sae_lens.StandardSAE(config)
    fill(sae)
    sae.save_model(folder)
    scaler = ActivationScaler(scaling_factor=0.3)
    scaler.save(str(folder / "activation_scaler.json"))
    wide = sae.to(torch.float64)
    wide.fold_activation_norm_scaling_factor(0.3)
    x = tokens()
    f = wide.encode(x)
    record(folder, x, f, wide.decode(f))


CASES["sae-lens-scaled"] = _lens_scaled

# ------------------------------------------------------------------------------------------------- sparsify


def _sparsify(name: str, **settings: Any) -> None:
    def write(folder: Path) -> None:
        coder = SparseCoder(D, SparseCoderConfig(k=K, **settings), dtype=torch.float32)
        fill(coder)
        coder.save_to_disk(folder)
        wide = coder.double()
        x = tokens()
        best = wide.encode(x)
        f = torch.zeros(len(x), wide.num_latents, dtype=torch.float64)
        f.scatter_(-1, best.top_indices, best.top_acts)
        record(folder, x, f, wide.decode(best.top_acts, best.top_indices))

    CASES[f"sparsify-{name}"] = write


_sparsify("plain", expansion_factor=3)
_sparsify("square", num_latents=D)
_sparsify("latents", num_latents=50)
_sparsify("transcoder", expansion_factor=2, transcode=True)
_sparsify("skip", expansion_factor=2, transcode=True, skip_connection=True)
_sparsify("groupmax", num_latents=F - F % K, activation="groupmax")

# -------------------------------------------------------------------------------------- dictionary_learning


def _dictionary(name: str, make: Callable[[], nn.Module], **trainer: Any) -> None:
    def write(folder: Path) -> None:
        module = make()
        fill(module)
        if hasattr(module, "threshold") and not isinstance(module.threshold, nn.Parameter):
            module.threshold.fill_(0.6)
        folder.mkdir(parents=True)
        torch.save(module.state_dict(), folder / "ae.pt")
        said = {
            "dict_class": name,
            "activation_dim": D,
            "dict_size": F,
            "layer": 2,
            "lm_name": "oracle",
            "submodule_name": "resid_post_layer_2",
            **trainer,
        }
        (folder / "config.json").write_text(json.dumps({"trainer": said, "buffer": {"ctx_len": 8}}))
        wide = module.double()
        x = tokens()
        f = wide.encode(x)
        record(folder, x, f, wide.decode(f))

    CASES[f"dictionary_learning-{name}"] = write


_dictionary("AutoEncoder", lambda: dictionary.AutoEncoder(D, F))
_dictionary("AutoEncoderNew", lambda: dictionary.AutoEncoderNew(D, F))
_dictionary("GatedAutoEncoder", lambda: dictionary.GatedAutoEncoder(D, F))
_dictionary("JumpReluAutoEncoder", lambda: dictionary.JumpReluAutoEncoder(D, F))
_dictionary("AutoEncoderTopK", lambda: AutoEncoderTopK(D, F, K), k=K)
_dictionary("BatchTopKSAE", lambda: BatchTopKSAE(D, F, K), k=K)
_dictionary("MatryoshkaBatchTopKSAE", lambda: MatryoshkaBatchTopKSAE(D, F, K, [F // 4, F - F // 4]), k=K)


# --------------------------------------------------------------------- where a public loader reads otherwise


def by_sae_lens(root: Path) -> dict[str, str]:
    """What sae-lens says to a checkpoint of sparsify, and whether it applies the scaling that lies beside another."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    found = {}
    try:
        sae_lens.SAE.load_from_disk(root / "sparsify-plain/layers.2", converter=sparsify_disk_loader)
        found["sparsify"] = "loaded"
    except (RuntimeError, ValueError) as error:
        found["sparsify"] = type(error).__name__
    expected = load_file(root / "sae-lens-scaled" / "oracle.safetensors")
    unscaled = sae_lens.SAE.load_from_disk(root / "sae-lens-scaled").to(torch.float64)
    same = torch.allclose(unscaled.encode(expected["x"]), expected["f"], rtol=1e-3, atol=1e-3)
    found["scaling"] = "applied" if same else "left out"
    return found | _by_its_hub_loaders(root)


def _by_its_hub_loaders(root: Path) -> dict[str, str]:
    """What sae-lens' loaders of two families make of folders here, which they take for repositories of the hub."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def from_disk(repo_id: str, filename: str, subfolder: str = "", force_download: bool = False) -> str:
        return str(Path(repo_id) / subfolder / filename)

    loaders.hf_hub_download = from_disk
    found = {}
    known, unknown = root / "dictionary_learning-MatryoshkaBatchTopKSAE", root / "unknown_class" / "sae"
    unknown.mkdir(parents=True)
    config = json.loads((known / "config.json").read_text())
    config["trainer"]["dict_class"] = "ClassOfTomorrow"
    (unknown / "config.json").write_text(json.dumps(config))
    (unknown / "ae.pt").write_bytes((known / "ae.pt").read_bytes())
    read, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1(str(unknown.parent), unknown.name)
    found["unknown dict_class"] = f"{read['architecture']}, {'with' if 'threshold' in state else 'without'} threshold"
    x, gate = _llama_scope(root / "llama_scope" / "sae")
    _, state, _ = loaders.llama_scope_sae_huggingface_loader(
        str(root / "llama_scope"), "sae", cfg_overrides={"dtype": "float32"}
    )
    theirs = x.float() @ state["W_enc"] + state["b_enc"] > state["threshold"]
    found["llama scope"] = "decoder norms counted" if torch.equal(theirs, gate) else "decoder norms left out"
    return found


def _llama_scope(folder: Path) -> tuple[Tensor, Tensor]:
    """A Llama Scope checkpoint as its authors write it; tokens, and which features their code takes for active."""
    threshold = 0.5
    settings = {
        "hook_point_in": "blocks.2.hook_resid_post", "hook_point_out": "blocks.2.hook_resid_post",
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": F / D,
        "d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": D**0.5, "out": D**0.5},
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": K, "lr": 1e-3,
    }  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "hyperparams.json").write_text(json.dumps(settings))
    values = {
        "encoder.weight": torch.randn(F, D) * D**-0.5, "encoder.bias": torch.randn(F) * 0.3,
        "decoder.weight": torch.randn(D, F) * torch.rand(F), "decoder.bias": torch.randn(D),
    }  # fmt: skip
    save_file(values, folder / "checkpoints" / "final.safetensors")
    x = tokens()
    wide = {name: value.double() for name, value in values.items()}
    pre = x @ wide["encoder.weight"].T + wide["encoder.bias"]
    gate = pre * wide["decoder.weight"].norm(dim=0) > threshold
    save_file({"x": x, "gate": gate}, folder.parent / "gates.safetensors")
    return x, gate


def main(root: Path) -> None:
    for seed, (name, write) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        # sparsify reads the hookpoint from the folder's name.
        folder = root / name / "layers.2" if name.startswith("sparsify") else root / name
        write(folder)
    (root / "sae_lens.json").write_text(json.dumps(by_sae_lens(root)))
    print(f"{len(CASES)} SAEs in {root}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
