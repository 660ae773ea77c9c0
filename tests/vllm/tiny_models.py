"""Tiny random models of the families that vLLM has classes of its own for, and what the definition says of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import sae_steer
from tests.sae_files import write_saelens

Json = dict[str, Any]

HIDDEN = 64
LAYERS = 3
VOCABULARY = 256
FEATURES = 32
_SIZES: Json = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the narrowest that vLLM's attention has on a CPU; z is twice as wide as the residual stream
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,  # nothing ends an answer early
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_TWO_HEADS: Json = {key: value for key, value in _SIZES.items() if key != "head_dim"} | {"num_attention_heads": 2}
_WINDOW: Json = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 32,
}
_EXPERTS: Json = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
CONFIGS: dict[str, tuple[str, Json]] = {
    "LlamaForCausalLM": ("LlamaConfig", _SIZES),
    "MistralForCausalLM": ("MistralConfig", _SIZES | {"sliding_window": None}),
    "Phi3ForCausalLM": ("Phi3Config", _TWO_HEADS),
    "Qwen2ForCausalLM": ("Qwen2Config", _TWO_HEADS),
    "Qwen3ForCausalLM": ("Qwen3Config", _SIZES),
    "GemmaForCausalLM": ("GemmaConfig", _SIZES | {"tie_word_embeddings": True}),
    "Gemma2ForCausalLM": ("Gemma2Config", _SIZES | _WINDOW | {"tie_word_embeddings": True}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _SIZES | _WINDOW | {"tie_word_embeddings": True}),
    "MixtralForCausalLM": (
        "MixtralConfig",
        _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", _TWO_HEADS | _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", _SIZES | _EXPERTS),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
}
"""By vLLM's class: the config's class, and its sizes."""
SEEDS = dict.fromkeys(CONFIGS, 7) | {
    "LlamaForCausalLM": 8,
    "MistralForCausalLM": 8,
    "Phi3ForCausalLM": 10,
    "Qwen2ForCausalLM": 8,
    "Gemma2ForCausalLM": 11,
    "Gemma3ForCausalLM": 10,
    "Qwen2MoeForCausalLM": 9,
}
"""Of the weights, such that no token of an answer is the best by less than :data:`CLOSEST`."""
CLOSEST = 2e-3
"""Smallest distance between the two best logits at which "the same token" is more than luck."""


def make_model(name: str, seed: int | None = None) -> PreTrainedModel:
    """A random model of a family in float32, with weights large enough that every edit shows in its logits."""
    config_name, sizes = CONFIGS[name]
    torch.manual_seed(SEEDS[name] if seed is None else seed)
    config = getattr(transformers, config_name)(**sizes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Gemma multiplies its embeddings, which are the head too: larger ones would repeat the last token.
                parameter.mul_(2 if "gemma" in config.model_type and "embed" in key else 6)
            elif "norm" in key or "ln_" in key:  # gains that are not all alike
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_saes(root: Path, model: PreTrainedModel) -> dict[str, Path]:
    """An SAE at every kind of place, in the first, the middle and the last layer, and a transcoder; by name."""
    config = model.config
    z = config.num_attention_heads * (getattr(config, "head_dim", None) or HIDDEN // config.num_attention_heads)
    hooks = {
        "pre0": "blocks.0.hook_resid_pre",
        "mid0": "blocks.0.hook_resid_mid",
        "post0": "blocks.0.hook_resid_post",
        "pre1": "blocks.1.hook_resid_pre",
        "z1": "blocks.1.attn.hook_z",
        "attn1": "blocks.1.hook_attn_out",
        "mid1": "blocks.1.hook_resid_mid",
        "in1": "blocks.1.mlp.hook_in",
        "out1": "blocks.1.hook_mlp_out",
        "post2": "blocks.2.hook_resid_post",
    }
    for seed, (name, hook) in enumerate(hooks.items()):
        width = z if name == "z1" else HIDDEN
        write_saelens(root / name, architecture="standard", d_in=width, n_features=FEATURES, hook_name=hook, seed=seed)
    write_saelens(
        root / "tc1", architecture="transcoder", d_in=HIDDEN, n_features=FEATURES, seed=99,
        hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out",
    )  # fmt: skip
    return {name: root / name for name in (*hooks, "tc1")}


class Int8Linear(nn.Linear):
    """A linear layer as 8-bit kernels compute it: one scale for each token of the input."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().amax(dim=-1, keepdim=True) / 127
        return nn.functional.linear((input / scale).round() * scale, self.weight, self.bias)


def quantize(model: PreTrainedModel, folder: Path) -> None:
    """Rounds a model's linear layers to 8 bits, in place, and saves it as compressed-tensors' W8A8.

    The residual stream, the norms and the head stay as they are.
    """
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            rounded = (module.weight.detach() / scale).round()
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rounded.to(torch.int8), scale
            module.weight.data = rounded * scale
            module.__class__ = Int8Linear
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@dataclass(frozen=True)
class Expected:
    """What transformers says of one request.

    Args:
        tokens: The completion.
        logprobs: Log-probabilities of its tokens.
        applied: The ``applied`` block; None = not steered.
    """

    tokens: list[int]
    logprobs: list[float]
    applied: Json | None


@torch.no_grad()
def expected(
    model: PreTrainedModel,
    saes: Mapping[str, Path],
    requests: Sequence[Json | None],
    *,
    prompt: Sequence[int],
    tokens: int,
    closest: float = CLOSEST,
) -> list[Expected]:
    """Greedy completions of one prompt with the SAEs hooked into transformers' own model."""
    limits = sae_steer.Limits(max_programs=len(requests))
    with sae_steer.attach(model, saes, limits=limits) as steer, steer.rows(requests) as rows:
        output = model.generate(
            input_ids=torch.tensor([list(prompt)] * len(requests)), max_new_tokens=tokens, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        blocks = rows.reports()
    completions, logits = output.sequences[:, len(prompt) :], torch.stack(output.scores, dim=1)
    best = logits.topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > closest
    logprobs = logits.log_softmax(dim=-1).gather(2, completions[..., None])[..., 0]
    return [Expected(*row) for row in zip(completions.tolist(), logprobs.tolist(), blocks, strict=True)]


def graph_key(llm: Any) -> str:
    """Under which key vLLM keeps an engine's compiled graphs, in the engine's process."""
    (key,) = llm.collective_rpc(lambda worker: worker.model_runner.vllm_config.compute_hash())
    return str(key)
