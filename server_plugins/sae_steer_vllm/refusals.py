"""What of vLLM's own configuration does not go together with steering: the start is refused, by name.

The table holds what was not shown by a test to work, beside what cannot. A row is taken out by a test that shows it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_steer.errors import StartError


@dataclass(frozen=True, slots=True)
class SetupRefusal:
    """Something in vLLM's configuration that does not go together with steering.

    Args:
        option: How users write it.
        asked: Whether a configuration asks for it.
        why: Why it is refused.
        instead: What to do instead.
    """

    option: str
    asked: Callable[[Any], object]
    why: str
    instead: str


def _get(config: Any, path: str) -> Any:
    """An attribute by its path; None where this version of vLLM has no such thing."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _more_than_one(path: str) -> Callable[[Any], object]:
    return lambda config: (_get(config, path) or 1) > 1


def _set(path: str) -> Callable[[Any], object]:
    return lambda config: bool(_get(config, path))


def _device(config: Any) -> str:
    return str(_get(config, "device_config.device_type") or _get(config, "device_config.device"))


def _captures_graphs(config: Any) -> bool:
    if _device(config) == "cpu":
        return False
    mode = _get(config, "compilation_config.cudagraph_mode")
    return getattr(mode, "name", str(mode)) != "NONE"


_UNSHOWN = "it was not shown to steer exactly"
REFUSALS: tuple[SetupRefusal, ...] = (
    SetupRefusal(
        "--speculative-config",
        _set("speculative_config"),
        "rejected drafts would be counted in the report, and drafts are made without steering",
        "serve without it",
    ),
    SetupRefusal(
        "--enable-dbo", _set("parallel_config.enable_dbo"), "it splits a step's rows between two passes", "leave it out"
    ),
    SetupRefusal(
        "--ubatch-size",
        lambda config: (_get(config, "parallel_config.ubatch_size") or 0) > 1,
        "it splits a step's rows between two passes",
        "leave it out",
    ),
    SetupRefusal(
        "--prefill-context-parallel-size",
        _more_than_one("parallel_config.prefill_context_parallel_size"),
        "it splits a prompt's rows between processes",
        "use tensor parallelism",
    ),
    SetupRefusal(
        "--decode-context-parallel-size",
        _more_than_one("parallel_config.decode_context_parallel_size"),
        _UNSHOWN,
        "use tensor parallelism",
    ),
    SetupRefusal(
        "sequence parallelism (pass_config.enable_sp)",
        lambda config: bool(
            _get(config, "compilation_config.pass_config.enable_sp")
            or _get(config, "compilation_config.pass_config.sp_min_token_num")
        ),
        "it gives each process a part of the rows of the residual stream",
        "leave it out",
    ),
    SetupRefusal(
        "sequence-parallel MoE (--enable-expert-parallel with data and tensor parallelism)",
        _set("parallel_config.use_sequence_parallel_moe"),
        "it splits the rows of the residual stream",
        "leave out expert parallelism",
    ),
    SetupRefusal(
        "--kv-sharing-fast-prefill",
        _set("cache_config.kv_sharing_fast_prefill"),
        "later layers skip rows of the prompt",
        "leave it out",
    ),
    SetupRefusal(
        "--kv-transfer-config",
        _set("kv_transfer_config"),
        "keys and values would come from engines that may not keep steered ones apart",
        "serve without a KV connector",
    ),
    SetupRefusal("--ec-transfer-config", _set("ec_transfer_config"), _UNSHOWN, "serve without an encoder connector"),
    SetupRefusal(
        "a model that is not a decoder alone",
        _set("model_config.is_encoder_decoder"),
        "its places have no names here",
        "serve a decoder-only model",
    ),
    SetupRefusal(
        "--runner pooling",
        lambda config: _get(config, "model_config.runner_type") not in (None, "generate"),
        "steering edits generation",
        "serve with --runner generate",
    ),
    SetupRefusal(
        "--model-impl transformers",
        lambda config: str(_get(config, "model_config.model_impl")).endswith("transformers"),
        "the places of that backend have no table",
        "use vLLM's own class of the model, or the embedded server",
    ),
    SetupRefusal("--enable-prompt-embeds", _set("model_config.enable_prompt_embeds"), _UNSHOWN, "send tokens"),
    SetupRefusal(
        "CUDA graphs",
        _captures_graphs,
        "the edit's kernels for GPUs, which a graph can hold, have not landed; without them it would replay one "
        "step's edits for ever",
        "serve with --enforce-eager",
    ),
)


def refuse_setup(vllm_config: Any) -> None:
    """Raises :class:`StartError` over the first row of the table that a configuration asks for."""
    for row in REFUSALS:
        if row.asked(vllm_config):
            raise StartError(f"Steering does not go together with {row.option}: {row.why}. Instead: {row.instead}.")
