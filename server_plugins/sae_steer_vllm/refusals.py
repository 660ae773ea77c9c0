"""What of vLLM's own configuration does not go together with steering: the start is refused, by name.

The table holds what was not shown by a test to work, beside what cannot. A row is taken out by a test that shows it.
Models are refused elsewhere: a class without a table of places is not in :mod:`.families`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_steer.errors import StartError


@dataclass(frozen=True, slots=True)
class SetupRefusal:
    """Something in vLLM's configuration that does not go together with steering.

    Args:
        option: How users write it.
        paths: The attributes of vLLM's configuration that say so; one that a version does not have is None.
        when: From their values to whether it is asked.
        why: Why it is refused.
        instead: What to do instead.
    """

    option: str
    paths: tuple[str, ...]
    when: Callable[..., object]
    why: str
    instead: str

    def asked(self, config: Any) -> bool:
        """Whether a configuration asks for it."""
        return bool(self.when(*(_get(config, path) for path in self.paths)))


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _many(number: int | None) -> bool:
    return (number or 1) > 1


def _transformers(named: object, chosen: object) -> bool:
    """``auto`` may choose it too, for a model that vLLM has no class of its own for."""
    return getattr(named, "value", named) == "transformers" or (callable(chosen) and bool(chosen()))


def _captures_graphs(mode: object, device: str | None) -> bool:
    return device != "cpu" and getattr(mode, "name", str(mode)) != "NONE"


_WORKERS = (None, "auto", "vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
_UNSHOWN = "it was not shown to steer exactly"
_TWO_PASSES = "it splits a step's rows between two passes"
REFUSALS: tuple[SetupRefusal, ...] = (
    SetupRefusal(
        "--speculative-config",
        ("speculative_config",),
        bool,
        "rejected drafts would be counted in the report, and drafts are made without steering",
        "serve without it",
    ),
    SetupRefusal("--enable-dbo", ("parallel_config.enable_dbo",), bool, _TWO_PASSES, "leave it out"),
    SetupRefusal("--ubatch-size", ("parallel_config.ubatch_size",), _many, _TWO_PASSES, "leave it out"),
    SetupRefusal(
        "--prefill-context-parallel-size",
        ("parallel_config.prefill_context_parallel_size",),
        _many,
        "it splits a prompt's rows between processes",
        "use tensor parallelism",
    ),
    SetupRefusal(
        "--decode-context-parallel-size",
        ("parallel_config.decode_context_parallel_size",),
        _many,
        _UNSHOWN,
        "use tensor parallelism",
    ),
    SetupRefusal(
        # Gone in 0.31. Fusing its communication (fuse_gemm_comms) switches it on, before this table is asked.
        "sequence parallelism (pass_config.enable_sp)",
        ("compilation_config.pass_config.enable_sp",),
        bool,
        "it gives each process a part of the rows of the residual stream",
        "leave it out",
    ),
    SetupRefusal(
        "--enable-expert-parallel",
        ("parallel_config.enable_expert_parallel",),
        bool,
        f"{_UNSHOWN}, and with data and tensor parallelism it splits the rows of the residual stream",
        "use tensor parallelism",
    ),
    SetupRefusal(
        "--data-parallel-size with a mixture of experts",
        ("model_config.is_moe", "parallel_config.data_parallel_size"),
        lambda experts, ranks: experts and _many(ranks),
        "its engines run in step with each other, which was not shown to steer exactly",
        "use tensor parallelism, or servers of their own",
    ),
    SetupRefusal(
        "--enable-fault-tolerance",
        ("parallel_config.enable_fault_tolerance",),
        bool,
        "a worker that is started again knows no program of the requests that go on",
        "leave it out",
    ),
    SetupRefusal(
        "--distributed-executor-backend other than mp and uni",
        ("parallel_config.distributed_executor_backend",),
        lambda backend: backend not in (None, "mp", "uni"),
        _UNSHOWN,
        "leave it out: vLLM's own processes run on one machine, and on several with --nnodes",
    ),
    SetupRefusal(
        "--data-parallel-backend ray",
        ("parallel_config.data_parallel_backend",),
        lambda backend: backend not in (None, "mp"),
        _UNSHOWN,
        "leave it out",
    ),
    SetupRefusal(
        "--worker-cls",
        ("parallel_config.worker_cls",),
        lambda name: name not in _WORKERS,
        "a worker that is not vLLM's own for GPUs or CPUs may run the model without steering",
        "leave it out",
    ),
    SetupRefusal("--diffusion-config", ("diffusion_config",), bool, "it computes positions again", "leave it out"),
    SetupRefusal(
        "--scheduler-cls",
        ("scheduler_config.scheduler_cls",),
        bool,
        "slots are given beside vLLM's own scheduler",
        "leave it out",
    ),
    SetupRefusal(
        # Only where it is asked for: by itself vLLM leaves it off there.
        "--async-scheduling with --pipeline-parallel-size and the V1 model runner",
        ("scheduler_config.async_scheduling", "parallel_config.pipeline_parallel_size", "use_v2_model_runner"),
        lambda ahead, stages, second: ahead and _many(stages) and not second,
        "vLLM does not support it, and a token could be read that the engine then throws away",
        "leave out --async-scheduling",
    ),
    SetupRefusal(
        "--kv-sharing-fast-prefill",
        ("cache_config.kv_sharing_fast_prefill",),
        bool,
        "later layers skip rows of the prompt",
        "leave it out",
    ),
    SetupRefusal(
        "--kv-transfer-config",  # --kv-offloading-size makes one
        ("kv_transfer_config",),
        bool,
        "keys and values would come from engines that may not keep steered ones apart",
        "serve without a KV connector and without --kv-offloading-size",
    ),
    SetupRefusal("--ec-transfer-config", ("ec_transfer_config",), bool, _UNSHOWN, "serve without an encoder connector"),
    SetupRefusal(
        "--cpu-offload-gb and --offload-group-size",
        ("offload_config.uva.cpu_offload_gb", "offload_config.prefetch.offload_group_size"),
        lambda uva, prefetch: uva or prefetch,
        "it puts itself in the place of the layers that are hooked",
        "use tensor or pipeline parallelism",
    ),
    SetupRefusal(
        "--enable-sleep-mode",
        ("model_config.enable_sleep_mode",),
        bool,
        "an engine that wakes up has lost the programs that it held",
        "leave it out",
    ),
    SetupRefusal(
        "a model that is not a decoder alone",
        ("model_config.is_encoder_decoder",),
        bool,
        "its places have no names here",
        "serve a decoder-only model",
    ),
    SetupRefusal(
        "--runner pooling",
        ("model_config.runner_type",),
        lambda runner: runner not in (None, "generate"),
        "steering edits generation",
        "serve with --runner generate",
    ),
    SetupRefusal(
        "--model-impl transformers",
        ("model_config.model_impl", "model_config.using_transformers_backend"),
        _transformers,
        "the places of that backend have no table",
        "use vLLM's own class of the model, or the embedded server",
    ),
    SetupRefusal("--enable-prompt-embeds", ("model_config.enable_prompt_embeds",), bool, _UNSHOWN, "send tokens"),
    SetupRefusal(
        "CUDA graphs",
        ("compilation_config.cudagraph_mode", "device_config.device_type"),
        _captures_graphs,
        "the edit's kernels for GPUs, which a graph can hold, have not landed; without them it would replay one "
        "step's edits for ever",
        "serve with --enforce-eager",
    ),
)


def refuse_setup(vllm_config: Any) -> None:
    """Raises :class:`StartError` over the first row of the table that a configuration asks for.

    The one front end of vLLM's that is not in Python is asked for by an environment variable alone.
    """
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip() not in ("", "0"):
        raise StartError(
            "Steering does not go together with VLLM_USE_RUST_FRONTEND: that front end loads no plugins, and would "
            "answer steered requests unsteered. Instead: unset it."
        )
    for row in REFUSALS:
        if row.asked(vllm_config):
            raise StartError(f"Steering does not go together with {row.option}: {row.why}. Instead: {row.instead}.")
