"""What is refused at the start, on configurations that vLLM itself has made; nothing is loaded."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sae_steer_vllm.refusals import REFUSALS
from tests.vllm.engine_script import OPTIONS, EngineFailed, Host, Json, hosted, nothing, plugin, start_llm


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A process that may import vLLM."""
    with hosted(tmp_path_factory.mktemp("setup"), nothing) as process:
        yield process


def rows_of(_: None, options: Json) -> list[str]:
    """The rows of the table that engine arguments ask for."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**(OPTIONS | options)).create_engine_config()
    return [row.option for row in REFUSALS if row.asked(config)]


def paths_missing(_: None) -> list[str]:
    """The attributes of the table that a configuration does not have."""
    from vllm.engine.arg_utils import EngineArgs

    config: Any = EngineArgs(**OPTIONS).create_engine_config()
    missing = []
    for path in {path for row in REFUSALS for path in row.paths}:
        owner, _dot, name = path.rpartition(".")
        place: Any = config
        for step in owner.split(".") if owner else ():
            place = getattr(place, step)
        if not hasattr(place, name):
            missing.append(path)
    return missing


def start(_: None, options: Json, environment: Mapping[str, str] | None = None) -> None:
    """Starts an engine."""
    os.environ.update(environment or {})
    try:
        start_llm(plugin(), options)
    finally:
        for name in environment or {}:
            del os.environ[name]


GONE = {"compilation_config.pass_config.enable_sp"}
"""Attributes that only older versions have."""


def test_the_table_asks_for_attributes_that_there_are(host: Host) -> None:
    assert set(host.run(paths_missing)) <= GONE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"enable_lora": True},
        {"async_scheduling": True},
        {"scheduling_policy": "priority"},
        {"kv_cache_dtype": "fp8"},
        {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
    ],
    ids=str,
)
def test_what_is_not_refused(host: Host, options: Json) -> None:
    assert host.run(rows_of, options) == []


NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}
SCHEDULER = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"


# Not here, since vLLM refuses them by itself on a CPU: --enable-dbo, --ubatch-size, context parallelism, fault
# tolerance, Ray and sleep mode.
@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("--speculative-config", NGRAM),
        ("--distributed-executor-backend other than mp and uni", {"distributed_executor_backend": "external_launcher"}),
        ("--worker-cls", {"worker_cls": "their.Worker"}),
        ("--diffusion-config", {"diffusion_config": {"canvas_length": 32}}),
        ("--scheduler-cls", {"scheduler_cls": SCHEDULER}),
        ("--kv-sharing-fast-prefill", {"kv_sharing_fast_prefill": True}),
        ("--kv-transfer-config", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
        ("--kv-transfer-config", {"kv_offloading_size": 1.0}),
        ("--ec-transfer-config", {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}}),
        ("--cpu-offload-gb and --offload-group-size", {"cpu_offload_gb": 0.01}),
        ("--cpu-offload-gb and --offload-group-size", {"offload_group_size": 2}),
        ("--runner pooling", {"runner": "pooling"}),
        ("--model-impl transformers", {"model_impl": "transformers"}),
        ("--enable-prompt-embeds", {"enable_prompt_embeds": True}),
    ],
)
def test_what_is_refused(host: Host, option: str, options: Json) -> None:
    assert option in host.run(rows_of, options)


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("--data-parallel-size with a mixture of experts", {"data_parallel_size": 2}),
        ("--enable-expert-parallel", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    ],
)
def test_what_is_refused_for_a_mixture_of_experts(host: Host, tmp_path: Path, option: str, options: Json) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 2, "num_hidden_layers": 1, "vocab_size": 64}
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **sizes, **experts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mixture = {"model": str(tmp_path), "skip_tokenizer_init": True}
    assert host.run(rows_of, mixture) == []
    assert host.run(rows_of, mixture | options) == [option]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NGRAM, "--speculative-config: rejected drafts would be counted in the report"),
        ({"kv_offloading_size": 1.0}, "--kv-transfer-config: keys and values would come from engines"),
        ({"runner": "pooling"}, "--runner pooling: steering edits generation"),
    ],
)
def test_an_engine_is_refused_before_it_loads_a_model(host: Host, options: Json, message: str) -> None:
    with pytest.raises(EngineFailed, match=f"StartError: Steering does not go together with {message}"):
        host.run(start, options)
    assert "Starting to load model" not in host.log


def test_a_front_end_without_plugins_is_refused(host: Host) -> None:
    with pytest.raises(EngineFailed, match="StartError: Steering does not go together with VLLM_USE_RUST_FRONTEND"):
        host.run(start, {}, {"VLLM_USE_RUST_FRONTEND": "1"})
    assert "Starting to load model" not in host.log
