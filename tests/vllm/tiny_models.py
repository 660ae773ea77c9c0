"""Tiny random models of the families that vLLM has its own classes for, SAEs at their places, and an engine over them.

The engine is a process of its own (``python -m tests.vllm.tiny_models``, JSON in and out): vLLM keeps process groups,
compiled code and patched settings for as long as a process lives, and warns at import.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.sae_files import write_saelens

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
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


def make_model(name: str) -> PreTrainedModel:
    """A random model of a family in float32, with weights large enough that every edit shows in its logits."""
    config_name, sizes = CONFIGS[name]
    torch.manual_seed(7)
    config = getattr(transformers, config_name)(**sizes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            elif "norm" in key or "ln_" in key:  # gains that are not all alike
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_saes(root: Path, model: PreTrainedModel) -> list[str]:
    """An SAE at every place of some layer, the first and the last among them; the names of their folders."""
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
    return [*hooks, "tc1"]


@dataclass(frozen=True)
class Answer:
    """What the engine gave for one request.

    Args:
        tokens: The completion.
        block: Its ``steering`` block; None = not steered.
    """

    tokens: list[int]
    block: Json | None


def run_engine(
    model: Path,
    config: Json,
    requests: Sequence[Mapping[str, Any] | None],
    *,
    prompt: Sequence[int],
    max_tokens: int,
    **arguments: Any,
) -> list[Answer]:
    """Greedy answers of an offline engine, all requests in one batch.

    Args:
        model: The model's folder.
        config: The plugin's configuration.
        requests: What each one asks; None = nothing.
        prompt: Token ids of the prompt of all of them.
        max_tokens: Length of the answers.
        arguments: Of ``vllm.LLM``, over the defaults.

    Raises:
        RuntimeError: It did not start, or died; the message holds its output.
    """
    job = {
        "arguments": {"model": str(model), "additional_config": {"sae_steer": config}, **arguments},
        "requests": list(requests), "prompt": list(prompt), "max_tokens": max_tokens,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.tiny_models"], input=json.dumps(job), text=True, cwd=ROOT, timeout=280,
        capture_output=True, check=False, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"The engine ended with {done.returncode}.\n{done.stdout}\n{done.stderr}")
    return [Answer(**answer) for answer in json.loads(done.stdout.splitlines()[-1])]


ENVIRONMENT = {
    "VLLM_PLUGINS": "sae_steer",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def _main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams  # after the environment is set, in this process alone

    defaults = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True,
        "max_model_len": 64, "max_num_seqs": 32, "max_num_batched_tokens": 2048,
    }  # fmt: skip
    llm = LLM(**(defaults | job["arguments"]))
    parameters = [
        SamplingParams(
            temperature=0, max_tokens=job["max_tokens"], detokenize=False,
            extra_args={"steering": request} if request is not None else None,
        )
        for request in job["requests"]
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": job["prompt"]}] * len(parameters), parameters, use_tqdm=False)
    answers = [
        {"tokens": list(choice.token_ids), "block": getattr(choice, "steering", None)}
        for output in outputs
        for choice in output.outputs
    ]
    print(json.dumps(answers))


if __name__ == "__main__":
    _main()
