"""What of vLLM's own configuration is refused at the start: every row of the table, and nothing beside it."""

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from sae_steer.errors import StartError
from sae_steer_vllm.refusals import REFUSALS, refuse_setup


class Graphs(Enum):
    """By vLLM's names for them."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (2, 1)


def plain() -> SimpleNamespace:
    """Of a configuration what the table may look at, with nothing asked that it refuses."""
    space = SimpleNamespace
    return space(
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        diffusion_config=None,
        parallel_config=space(
            enable_dbo=False,
            ubatch_size=0,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            data_parallel_size=2,
            enable_expert_parallel=False,
            enable_fault_tolerance=False,
            distributed_executor_backend="mp",
            data_parallel_backend="mp",
            worker_cls="vllm.v1.worker.gpu_worker.Worker",
        ),
        scheduler_config=space(scheduler_cls=None, async_scheduling=False),
        use_v2_model_runner=False,
        cache_config=space(kv_sharing_fast_prefill=False),
        offload_config=space(uva=space(cpu_offload_gb=0), prefetch=space(offload_group_size=0)),
        model_config=space(
            is_encoder_decoder=False,
            is_moe=False,
            runner_type="generate",
            model_impl="auto",
            using_transformers_backend=lambda: False,
            enable_prompt_embeds=False,
            enable_sleep_mode=False,
        ),
        compilation_config=space(cudagraph_mode=Graphs.NONE, pass_config=space(enable_sp=False)),
        device_config=space(device_type="cuda"),
    )


PARALLEL, MODEL = "parallel_config.", "model_config."
SOMETHING = SimpleNamespace()
ASKING: dict[str, list[tuple[str, Any]]] = {
    "--speculative-config": [("speculative_config", SOMETHING)],
    "--enable-dbo": [(f"{PARALLEL}enable_dbo", True)],
    "--ubatch-size": [(f"{PARALLEL}ubatch_size", 2)],
    "--prefill-context-parallel-size": [(f"{PARALLEL}prefill_context_parallel_size", 2)],
    "--decode-context-parallel-size": [(f"{PARALLEL}decode_context_parallel_size", 2)],
    "sequence parallelism (pass_config.enable_sp)": [("compilation_config.pass_config.enable_sp", True)],
    "--enable-expert-parallel": [(f"{PARALLEL}enable_expert_parallel", True)],
    "--data-parallel-size with a mixture of experts": [(f"{MODEL}is_moe", True)],
    "--enable-fault-tolerance": [(f"{PARALLEL}enable_fault_tolerance", True)],
    "--distributed-executor-backend other than mp and uni": [
        (f"{PARALLEL}distributed_executor_backend", value) for value in ("ray", "external_launcher", Graphs)
    ],
    "--data-parallel-backend ray": [(f"{PARALLEL}data_parallel_backend", "ray")],
    "--worker-cls": [(f"{PARALLEL}worker_cls", "mine.Worker")],
    "--diffusion-config": [("diffusion_config", SOMETHING)],
    "--scheduler-cls": [("scheduler_config.scheduler_cls", value) for value in ("mine.Scheduler", Graphs)],
    "--async-scheduling with --pipeline-parallel-size and the V1 model runner": [
        ("scheduler_config.async_scheduling", True)
    ],
    "--kv-sharing-fast-prefill": [("cache_config.kv_sharing_fast_prefill", True)],
    "--kv-transfer-config": [("kv_transfer_config", SOMETHING)],
    "--ec-transfer-config": [("ec_transfer_config", SOMETHING)],
    "--cpu-offload-gb and --offload-group-size": [
        ("offload_config.uva.cpu_offload_gb", 0.5),
        ("offload_config.prefetch.offload_group_size", 2),
    ],
    "--enable-sleep-mode": [(f"{MODEL}enable_sleep_mode", True)],
    "a model that is not a decoder alone": [(f"{MODEL}is_encoder_decoder", True)],
    "--runner pooling": [(f"{MODEL}runner_type", "pooling"), (f"{MODEL}runner_type", "draft")],
    "--model-impl transformers": [
        (f"{MODEL}model_impl", "transformers"),
        (f"{MODEL}using_transformers_backend", lambda: True),
    ],
    "--enable-prompt-embeds": [(f"{MODEL}enable_prompt_embeds", True)],
    "CUDA graphs": [("compilation_config.cudagraph_mode", mode) for mode in Graphs if mode is not Graphs.NONE],
}
CASES = [(option, *change) for option, changes in ASKING.items() for change in changes]


def asking(path: str, value: Any) -> SimpleNamespace:
    """A plain configuration with one attribute changed."""
    config = plain()
    *owners, name = path.split(".")
    place = config
    for owner in owners:
        place = getattr(place, owner)
    assert hasattr(place, name)
    setattr(place, name, value)
    return config


def refused(config: SimpleNamespace) -> list[str]:
    """The rows that a configuration asks for."""
    return [row.option for row in REFUSALS if row.asked(config)]


def test_every_row_has_its_case() -> None:
    assert set(ASKING) == {row.option for row in REFUSALS}
    assert len({row.option for row in REFUSALS}) == len(REFUSALS)


def test_every_attribute_that_a_row_looks_at_is_changed_by_a_case() -> None:
    changed = {path for _, path, _ in CASES}
    looked_at = {path for row in REFUSALS for path in row.paths}
    # The other halves of three conditions, which `plain` has as they must be for the row to fire.
    others = {f"{PARALLEL}data_parallel_size", f"{PARALLEL}pipeline_parallel_size", "use_v2_model_runner"}
    assert looked_at - changed == {"device_config.device_type", *others}


def test_a_plain_configuration_is_not_refused() -> None:
    assert refused(plain()) == []
    refuse_setup(plain())


@pytest.mark.parametrize(("option", "path", "value"), CASES)
def test_each_row_fires_for_what_it_names_and_alone(option: str, path: str, value: Any) -> None:
    config = asking(path, value)
    assert refused(config) == [option]
    with pytest.raises(StartError) as caught:
        refuse_setup(config)
    row = next(row for row in REFUSALS if row.option == option)
    for part in (row.option, row.why, row.instead):
        assert part
        assert part in caught.value.message
    assert caught.value.code == "cannot_start"


def test_the_first_of_several_is_told() -> None:
    config = asking("parallel_config.enable_dbo", True)
    config.kv_transfer_config = SOMETHING
    with pytest.raises(StartError, match="--enable-dbo"):
        refuse_setup(config)


def test_a_version_that_lacks_an_option_asks_for_nothing() -> None:
    """Attributes come and go between versions; the device is always there."""
    refuse_setup(SimpleNamespace(device_config=SimpleNamespace(device_type="cpu")))


def test_a_cpu_captures_no_graphs() -> None:
    config = asking("compilation_config.cudagraph_mode", Graphs.FULL)
    config.device_config.device_type = "cpu"
    assert refused(config) == []


def test_experts_in_one_engine_are_not_refused() -> None:
    config = asking("model_config.is_moe", True)
    config.parallel_config.data_parallel_size = 1
    assert refused(config) == []


@pytest.mark.parametrize(("stages", "second"), [(1, False), (2, True)])
def test_a_runner_that_can_schedule_ahead_is_not_refused(stages: int, second: bool) -> None:
    config = asking("scheduler_config.async_scheduling", True)
    config.parallel_config.pipeline_parallel_size, config.use_v2_model_runner = stages, second
    assert refused(config) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_config.model_impl", "vllm"),
        ("parallel_config.ubatch_size", 1),
        ("parallel_config.distributed_executor_backend", "uni"),
        ("parallel_config.distributed_executor_backend", None),
        ("parallel_config.worker_cls", "auto"),
        ("parallel_config.worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker"),
        ("compilation_config.cudagraph_mode", Graphs.NONE),
    ],
)
def test_what_goes_together_with_steering(path: str, value: Any) -> None:
    refuse_setup(asking(path, value))


@pytest.mark.parametrize(("value", "allowed"), [("1", False), ("true", False), (" 1 ", False), ("0", True), ("", True)])
def test_a_front_end_without_plugins_is_refused(value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    if allowed:
        refuse_setup(plain())
        return
    with pytest.raises(StartError, match="VLLM_USE_RUST_FRONTEND"):
        refuse_setup(plain())
