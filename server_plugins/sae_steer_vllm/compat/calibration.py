"""For a calibration: an engine that runs its texts, and the count that its workers keep."""

from collections.abc import Callable
from typing import Any

from vllm.distributed.parallel_state import get_tp_group

from sae_steer.errors import StartError
from sae_steer_vllm.compat.versions import MINE
from sae_steer_vllm.harvest import Harvest
from sae_steer_vllm.worker import Worker


def offline_engine(options: dict[str, Any]) -> tuple[Any, Callable[[dict[str, Any]], Any]]:
    """``vllm.LLM``, and what makes the parameters of a request of one token from its ``extra_args``."""
    from vllm import LLM, SamplingParams

    def params(extra_args: dict[str, Any]) -> Any:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=extra_args)

    return LLM(**options), params


def harvest(self: Any, command: str, payload: bytes) -> bytes | bool | None:
    """Begins a calibration in a worker, or takes what it counted; asked over ``collective_rpc``."""
    runner = self.model_runner
    worker: Worker | None = getattr(runner, MINE, None)
    if worker is None:
        raise StartError("This engine has no configuration of the plugin.")
    if command == "take":
        return worker.harvest.take() if worker.harvest is not None else None
    if get_tp_group().rank_in_group == 0:
        worker.harvest = Harvest.start(runner.get_model(), worker.catalog, payload, runner.device)
    return worker.harvest is not None
