"""A random Llama of about 100 M parameters, SAEs at four of its layers and vectors: what the benchmarks run on.

Smaller models measure Python, not steering. With a tokenizer of as many made-up words as the model has ids, any server
can load it.

    python benchmarks/random_model.py build/random    # writes it, and the command that serves it with vLLM
    sae-steer bench serve --launch "$(cat build/random/launch.txt)"
"""

import argparse
import json
import shlex
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HOOKED = (2, 5, 8, 11)
FEATURES = 1024
WIDE = 16384
"""Features of the SAE whose largest are read; it is held whole, beside another at the first hooked layer."""
VOCABULARY = 16384
WIDTH = 768


def build() -> LlamaForCausalLM:
    """The model, the same each time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write_sae(folder: Path, width: int, layer: int, features: int = FEATURES) -> Path:
    """A random JumpReLU SAE in SAELens' layout."""
    folder.mkdir(exist_ok=True)
    directions = torch.nn.functional.normalize(torch.randn(features, width), dim=1)
    save_file(
        {
            "W_enc": directions.T.contiguous(),
            "W_dec": directions,
            "b_enc": torch.zeros(features),
            "b_dec": torch.zeros(width),
            "threshold": torch.full((features,), 0.1),
        },
        folder / "sae_weights.safetensors",
    )
    config = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write(folder: Path) -> int:
    """Writes all of it; returns the number of parameters.

    Vector ``v<layer>`` is the decoder row of the SAE's first feature. SAE ``wide`` is the one that is held whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build()
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder / "model"
    )
    for layer in HOOKED:
        sae = write_sae(folder / f"l{layer}", model.config.hidden_size, layer)
        row = load_file(sae / "sae_weights.safetensors")["W_dec"][0].clone()
        save_file({"v": row}, folder / f"v{layer}.safetensors")
    write_sae(folder / "wide", model.config.hidden_size, HOOKED[0], WIDE)
    (folder / "launch.txt").write_text(shlex.join(launch(folder)) + "\n")
    return sum(p.numel() for p in model.parameters())


def plugin_config(folder: Path, programs: int = 64, *, wide: bool = False) -> dict[str, object]:
    """What the vLLM plugin loads of it; ``wide`` is whether the wide SAE is among it."""
    whole = [{"name": "wide", "location": str(folder / "wide"), "whole": True}] if wide else []
    return {
        "saes": [*({"name": f"l{layer}", "location": str(folder / f"l{layer}")} for layer in HOOKED), *whole],
        "vectors": [{"name": f"v{layer}", "location": str(folder / f"v{layer}.safetensors")} for layer in HOOKED],
        "limits": {"max_programs": programs},
    }


def launch(folder: Path) -> list[str]:
    """The command line of a vLLM server of it."""
    return [
        "vllm", "serve", str(folder / "model"), "--served-model-name", "random", "--dtype", "float32",
        "--max-model-len", "256", "--max-num-seqs", "64",
        "--additional-config", json.dumps({"sae_steer": plugin_config(folder, wide=True)}),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(f"{write(folder) / 1e6:.0f} M parameters in {folder / 'model'}; {folder / 'launch.txt'} serves them")


if __name__ == "__main__":
    main()
