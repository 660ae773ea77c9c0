"""What of vLLM's own configuration is refused at the start: every row of the table, and nothing beside it."""

from copy import deepcopy
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from sae_steer.errors import StartError
from sae_steer_vllm.refusals import REFUSALS, SetupRefusal, refuse_setup


class Graphs(Enum):
    """By vLLM's names for them."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (2, 1)


def plain() -> SimpleNamespace:
    """What of a configuration without any option the table may look at."""
    space = SimpleNamespace
    return space(
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        lora_config=None,
        parallel_config=space(
            enable_dbo=False,
            ubatch_size=0,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            data_parallel_size=2,
            use_sequence_parallel_moe=False,
        ),
        cache_config=space(kv_sharing_fast_prefill=False, enable_prefix_caching=True),
        model_config=space(
            is_encoder_decoder=False, runner_type="generate", model_impl="auto", enable_prompt_embeds=False
        ),
        compilation_config=space(cudagraph_mode=Graphs.NONE, pass_config=space(enable_sp=False, sp_min_token_num=None)),
        device_config=space(device_type="cuda"),
    )


ASKING: dict[str, list[tuple[str, Any]]] = {
    "--speculative-config": [("speculative_config", SimpleNamespace(method="ngram"))],
    "--enable-dbo": [("parallel_config.enable_dbo", True)],
    "--ubatch-size": [("parallel_config.ubatch_size", 2)],
    "--prefill-context-parallel-size": [("parallel_config.prefill_context_parallel_size", 2)],
    "--decode-context-parallel-size": [("parallel_config.decode_context_parallel_size", 2)],
    "sequence parallelism (pass_config.enable_sp)": [
        ("compilation_config.pass_config.enable_sp", True),
        ("compilation_config.pass_config.sp_min_token_num", 1),
    ],
    "sequence-parallel MoE (--enable-expert-parallel with data and tensor parallelism)": [
        ("parallel_config.use_sequence_parallel_moe", True)
    ],
    "--kv-sharing-fast-prefill": [("cache_config.kv_sharing_fast_prefill", True)],
    "--kv-transfer-config": [("kv_transfer_config", SimpleNamespace(kv_connector="x"))],
    "--ec-transfer-config": [("ec_transfer_config", SimpleNamespace())],
    "a model that is not a decoder alone": [("model_config.is_encoder_decoder", True)],
    "--runner pooling": [("model_config.runner_type", "pooling"), ("model_config.runner_type", "draft")],
    "--model-impl transformers": [("model_config.model_impl", "transformers")],
    "--enable-prompt-embeds": [("model_config.enable_prompt_embeds", True)],
    "CUDA graphs": [
        ("compilation_config.cudagraph_mode", Graphs.PIECEWISE),
        ("compilation_config.cudagraph_mode", Graphs.FULL),
        ("compilation_config.cudagraph_mode", Graphs.FULL_AND_PIECEWISE),
    ],
}
CASES = [(option, *change) for option, changes in ASKING.items() for change in changes]


def asking(path: str, value: Any) -> SimpleNamespace:
    config = deepcopy(plain())
    *owners, name = path.split(".")
    place = config
    for owner in owners:
        place = getattr(place, owner)
    assert hasattr(place, name)
    setattr(place, name, value)
    return config


def row_of(option: str) -> SetupRefusal:
    return next(row for row in REFUSALS if row.option == option)


def test_every_row_has_its_case() -> None:
    assert set(ASKING) == {row.option for row in REFUSALS}
    assert len({row.option for row in REFUSALS}) == len(REFUSALS)


def test_a_plain_configuration_is_not_refused() -> None:
    refuse_setup(plain())
    assert not any(row.asked(plain()) for row in REFUSALS)


@pytest.mark.parametrize(("option", "path", "value"), CASES)
def test_each_row_fires_for_what_it_names_and_alone(option: str, path: str, value: Any) -> None:
    config = asking(path, value)
    assert [row.option for row in REFUSALS if row.asked(config)] == [option]
    with pytest.raises(StartError) as caught:
        refuse_setup(config)
    row = row_of(option)
    for part in (row.option, row.why, row.instead):
        assert part
        assert part in caught.value.message
    assert caught.value.code == "cannot_start"


def test_the_first_of_several_is_told() -> None:
    config = asking("parallel_config.enable_dbo", True)
    config.kv_transfer_config = SimpleNamespace()
    with pytest.raises(StartError, match="--enable-dbo"):
        refuse_setup(config)


def test_a_version_that_lacks_an_option_asks_for_nothing() -> None:
    """Attributes come and go between versions; the device is always there."""
    refuse_setup(SimpleNamespace(device_config=SimpleNamespace(device_type="cpu")))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cpu_captures_no_graphs(device: str) -> None:
    config = asking("compilation_config.cudagraph_mode", Graphs.FULL)
    config.device_config.device_type = device
    assert bool(row_of("CUDA graphs").asked(config)) == (device == "cuda")


def test_other_values_of_a_choice() -> None:
    refuse_setup(asking("model_config.model_impl", "vllm"))
    refuse_setup(asking("parallel_config.ubatch_size", 1))
