"""Beside the model: tables, hooks and the step's map, for each of vLLM's two model runners."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from sae_steer_vllm.channel import CARRIED, ON_OUTPUT
from sae_steer_vllm.compat.versions import MINE, configured
from sae_steer_vllm.config import PluginConfig, catalog_of
from sae_steer_vllm.worker import Carried, Shape, Worker

SITES = "sae_steer_sites"
"""Key of ``additional_config`` under which a worker writes down the places that its graphs hold."""

logger = init_logger("vllm.sae_steer")


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    config = configured(self.vllm_config)
    worker = _worker(self, config) if config is not None else None
    setattr(self, MINE, worker)


def _worker(runner: Any, config: PluginConfig) -> Worker:
    catalog = catalog_of(config)
    model_config, parallel = runner.vllm_config.model_config, runner.vllm_config.parallel_config
    shape = Shape(
        hidden=model_config.get_hidden_size(),
        heads=model_config.hf_text_config.num_attention_heads * model_config.get_head_size(),
        vocabulary=model_config.get_vocab_size(),
        dtype=model_config.dtype,
        device=runner.device,
        max_tokens=runner.max_num_tokens,
        ranks=parallel.tensor_parallel_size,
    )
    sites, agree = catalog.sites(config.extra_sites()), _all_agree if shape.ranks > 1 else bool
    worker = Worker(runner.get_model(), catalog, config.limits.limits(), sites, shape, agree)
    context = runner.vllm_config.compilation_config.static_forward_context
    context.update(worker.editors)
    # vLLM finds a compiled graph again by its configuration, which does not tell the sites that SAEs' files state.
    runner.vllm_config.additional_config[SITES] = [str(site) for site in worker.sites]
    hooked = ", ".join(str(site) for site in worker.hooked) or "none in this stage"
    logger.info("Steering: %s; %.1f MiB of tables, maps and memory for readings.", hooked, worker.nbytes / 2**20)
    return worker


def _all_agree(yes: bool) -> bool:
    """Whether every rank of tensor parallelism says so."""
    said = torch.tensor(int(yes))
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, get_tp_group().cpu_group)
    return bool(said)


def describe(self: Any) -> dict[str, Any] | None:
    """What a worker has, asked by the front end over ``collective_rpc``."""
    worker: Worker | None = getattr(self.model_runner, MINE, None)
    return worker.describe() if worker is not None else None


def _prepare_v1(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, scheduler_output, *args, **kwargs)
    worker: Worker | None = getattr(self, MINE)
    if worker is not None:
        worker.begin(
            self.input_batch.req_ids,
            self.query_start_loc.gpu,
            self.positions if isinstance(self.positions, torch.Tensor) else self.positions.gpu,
            self.input_ids.gpu,
            scheduler_output.total_num_scheduled_tokens,
        )
    return result


def _prepare_v2(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(self, *args, **kwargs)
    worker: Worker | None = getattr(self, MINE)
    if worker is not None:
        worker.begin(batch.req_ids, batch.query_start_loc, batch.positions, batch.input_ids, batch.num_tokens)
    return batch


def _execute_model(
    original: Any, self: Any, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
) -> Any:
    worker: Worker | None = getattr(self, MINE)
    if worker is None or kwargs.get("dummy_run") or (args and args[0]):
        return original(self, scheduler_output, intermediate_tensors, *args, **kwargs)
    worker.forget(scheduler_output.finished_req_ids)
    for request in scheduler_output.scheduled_new_reqs:
        if request.sampling_params is not None and request.prompt_token_ids is not None:
            worker.meet(request.req_id, request.sampling_params.extra_args, len(request.prompt_token_ids))
    before = None
    if intermediate_tensors is not None and CARRIED[0] in intermediate_tensors.tensors:
        before = Carried(*(intermediate_tensors.tensors.pop(name, None) for name in CARRIED))
    result = original(self, scheduler_output, intermediate_tensors, *args, **kwargs)
    done = worker.end(before)
    if isinstance(result, IntermediateTensors):
        if done is not None:
            tensors = zip(CARRIED, (done.sums, done.touched, done.reads), strict=True)
            # Where the hidden states are: parts of them may be sent by the processes of tensor parallelism.
            there = done.sums.device
            result.tensors.update((name, tensor.to(there)) for name, tensor in tensors if tensor is not None)
    else:
        self._sae_steer_done = worker.snapshot(done)
    return result


def _sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    snapshot, self._sae_steer_done = getattr(self, "_sae_steer_done", None), None
    if snapshot is None or result is None or result is EMPTY_MODEL_RUNNER_OUTPUT:
        return result
    if hasattr(result, "get_output"):  # of asynchronous scheduling: the output itself comes later
        get_output = result.get_output

        def with_snapshot() -> Any:
            output = get_output()
            setattr(output, ON_OUTPUT, snapshot)
            return output

        result.get_output = with_snapshot
    else:
        setattr(result, ON_OUTPUT, snapshot)
    return result


_V1, _V2 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
WRAPPERS: dict[str, Callable[..., Any]] = {
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model": _load_model,
    f"{_V1}.load_model": _load_model,
    f"{_V1}._prepare_inputs": _prepare_v1,
    f"{_V1}.execute_model": _execute_model,
    f"{_V1}.sample_tokens": _sample_tokens,
    f"{_V2}.load_model": _load_model,
    f"{_V2}.prepare_inputs": _prepare_v2,
    f"{_V2}.execute_model": _execute_model,
    f"{_V2}.sample_tokens": _sample_tokens,
}
