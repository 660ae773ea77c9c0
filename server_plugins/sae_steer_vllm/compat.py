"""Everything of vLLM that the plugin touches; no other file imports it.

The plugin has no fork and no subclass of vLLM's own: it wraps the functions of :mod:`.ledger`, each for the reason
given there, and hands over to files that know nothing of vLLM. A wrapper adds to a call and never replaces it, and does
nothing in an engine whose configuration does not name the plugin.

Longer than 400 lines because what changes when vLLM does is in one place.
"""

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
import vllm
from vllm.distributed.parallel_state import get_tp_group
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import RequestStatus
from vllm.v1.worker.worker_base import WorkerBase

from sae_steer.calibration.model import of_source
from sae_steer.capabilities import VLLM
from sae_steer.errors import RequestError, StartError
from sae_steer.footprint import Footprint
from sae_steer.program import Program
from sae_steer.slots import Slot, buckets_of
from sae_steer.wire import check, parse
from sae_steer_vllm import op
from sae_steer_vllm.channel import ASK, CARRIED, ON_OUTPUT, PROGRAM, SLOT, TICKET, is_ticket, payload_of, take
from sae_steer_vllm.config import PluginConfig, catalog_of, config_of
from sae_steer_vllm.frontend import Frontend, Told, admit
from sae_steer_vllm.gate import Gate
from sae_steer_vllm.harvest import Harvest
from sae_steer_vllm.refusals import refuse_setup
from sae_steer_vllm.worker import Carried, Shape, Worker

TESTED = ((0, 26), (0, 32))
"""First and last minor release that the plugin was made for."""

MINE = "_sae_steer"
"""Attribute under which vLLM's objects hold the plugin's parts."""

SITES = "sae_steer_sites"
"""Key of ``additional_config`` under which a worker writes down the places that its graphs hold."""

logger = init_logger("vllm.sae_steer")


class Refused(RequestError, VLLMValidationError):
    """A request that cannot be honoured, as vLLM's own front end knows such errors."""

    def __init__(self, error: RequestError) -> None:
        RequestError.__init__(self, error.message, param=error.param, code=error.code)
        self.parameter, self.value = error.param, None

    def __str__(self) -> str:
        return self.message


def version() -> tuple[int, int]:
    """Major and minor number of the running vLLM; zeros where it was built without one."""
    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def configured(vllm_config: Any) -> PluginConfig | None:
    """The plugin's configuration of an engine; None where it has none.

    Raises:
        StartError: It cannot be used, with this version of vLLM or with the rest of the engine's configuration.
    """
    config = config_of(vllm_config.additional_config)
    if config is None:
        return None
    if not TESTED[0] <= version() <= TESTED[1] and not config.allow_untested_vllm:
        first, last = (".".join(map(str, v)) for v in TESTED)
        raise StartError(
            f"This is vLLM {vllm.__version__}, and the plugin was made for {first} to {last}. Install one of those, or "
            'say "allow_untested_vllm": true in its configuration and run `sae-steer selftest` before you rely on it.'
        )
    if _MISSING:
        raise StartError(f"This vLLM ({vllm.__version__}) has no {', '.join(_MISSING)}, which steering needs.")
    return config


def frontend_of(vllm_config: Any) -> Frontend | None:
    """The front end of an engine; None where the plugin is not configured. Raises :class:`StartError`."""
    config = configured(vllm_config)
    if config is None:
        return None
    refuse_setup(vllm_config)
    catalog = catalog_of(config)
    if config.profiles is not None:
        model, folder = vllm_config.model_config, vllm_config.load_config.download_dir
        catalog = catalog.serving(of_source(str(model.model), revision=model.revision, cache=folder))
    bos = getattr(vllm_config.model_config.hf_text_config, "bos_token_id", None)
    sites = catalog.sites(config.extra_sites())
    return Frontend(catalog, VLLM, config.limits.limits(), sites, bos if isinstance(bos, int) else None)


def register() -> None:
    """Entry point ``vllm.general_plugins``: wraps what the ledger names, once a process."""
    if getattr(vllm, MINE, False):
        return
    setattr(vllm, MINE, True)
    op.found_by(lambda name: get_forward_context().no_compile_layers[name])
    for where, wrap in _WRAPPERS.items():
        _install(where, wrap)
    WorkerBase.sae_steer_describe = _describe  # type: ignore[attr-defined]
    WorkerBase.sae_steer_harvest = _harvest  # type: ignore[attr-defined]


def _install(where: str, wrap: Callable[..., Any]) -> None:
    """Puts a wrapper around a function of vLLM, under every name by which vLLM's modules know it."""
    module_name, _, name = where.partition(":")
    owner_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        owner = getattr(module, owner_name) if owner_name else module
        original = getattr(owner, attribute)
    except (ModuleNotFoundError, AttributeError):
        _MISSING.append(where)  # not raised: this may be an engine that does not steer
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrap(original, *args, **kwargs)

    setattr(owner, attribute, wrapped)
    for importer in _IMPORTERS.get(where, ()):
        try:
            other = importlib.import_module(importer)
        except ModuleNotFoundError:
            continue  # a version that has no such module
        if getattr(other, attribute, None) is original:
            setattr(other, attribute, wrapped)


_MISSING: list[str] = []
"""What is wrapped and not there: engines that do not steer run without it, others are refused."""

_IMPORTERS = {
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "vllm.v1.core.block_pool",
        "vllm.v1.simple_kv_offload.manager",
    ),
}


# The engine: slots, cache keys, the way back.


def _program_of(request: Any) -> Program | None:
    """The program of a request in the engine, parsed once."""
    found = request.__dict__.get(MINE, ...)
    if found is ...:
        extra = request.sampling_params.extra_args if request.sampling_params is not None else None
        found = parse(extra[PROGRAM]) if extra and PROGRAM in extra else None
        setattr(request, MINE, found)
    return found  # type: ignore[no-any-return]


def _block_keys(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    keys, next_mm = original(request, start_token_idx, end_token_idx, start_mm_idx)
    program = _program_of(request)
    if program is not None:
        footprint = request.__dict__.get("_sae_steer_footprint")
        if footprint is None:
            footprint = Footprint.of(program, request.num_prompt_tokens)
            request._sae_steer_footprint = footprint
        key = footprint.key(start_token_idx, end_token_idx)
        if key is not None:
            keys = (*(keys or ()), ("sae_steer", key))
    return keys, next_mm


def _scheduler_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    config = configured(self.vllm_config)
    if config is not None:
        refuse_setup(self.vllm_config)  # again: what asked before may have been another front end
    gate: Gate[Any] | None = Gate(buckets_of(config.limits.limits())) if config is not None else None
    setattr(self, MINE, gate)


def _preprocess(original: Any, self: Any, request: Any) -> Any:
    result = original(self, request)
    params = result[0].sampling_params
    if params is not None and ASK in (params.extra_args or ()):
        raise RequestError("steering: this request did not come through vLLM's front end.", param="steering")
    program = _program_of(result[0])
    if program is not None:
        config = configured(self.vllm_config)
        if config is None:
            raise StartError("A steered request came to an engine without the plugin's configuration.")
        catalog = catalog_of(config)
        check(program, catalog, config.limits.limits(), catalog.sites(config.extra_sites()))
    return result


def _add_request(original: Any, self: Any, request: Any) -> None:
    program = _program_of(request)
    if program is not None and request.request_id not in self.requests:
        params = request.sampling_params
        slot = getattr(self, MINE).enter(request.request_id, request, program, may_end=bool(params.stop))
        if slot is None:
            return
        _give(request, slot)
    original(self, request)


def _give(request: Any, slot: Any) -> None:
    params = request.sampling_params
    # Not in place: choices of one request share the dictionary.
    params.extra_args = {**params.extra_args, SLOT: [slot.bucket, slot.index]}


def _free_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, request, *args, **kwargs)
    gate = getattr(self, MINE)
    if gate is not None:
        _let_in(self, gate.leave(request.request_id))
    return result


def _let_in(scheduler: Any, admitted: list[tuple[Any, Slot]]) -> None:
    for request, slot in admitted:
        _give(request, slot)
        scheduler.add_request.__wrapped__(scheduler, request)


def _finish_requests(original: Any, self: Any, request_ids: Any, finished_status: Any) -> Any:
    gate = getattr(self, MINE)
    if gate is None:
        return original(self, request_ids, finished_status)
    names = None if request_ids is None else {request_ids} if isinstance(request_ids, str) else set(request_ids)
    gone, admitted = gate.drop(names)
    for request in gone:
        request.status = finished_status
    _let_in(self, admitted)
    return original(self, names, finished_status) + gone


def _cached_blocks(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    program = _program_of(request) if request.sampling_params is not None else None
    first = program.first_read(request.num_prompt_tokens) if program is not None else None
    # vLLM computes the last token anyhow, and so looks for one fewer than there are.
    capped = request if first is None or first + 1 >= request.num_tokens else _Shorter(request, first + 1)
    return original(self, capped, *args, **kwargs)


class _Shorter:
    """A request as if it had fewer tokens: the prefix cache is asked for no more of it.

    Args:
        request: vLLM's.
        tokens: How many it is said to have.
    """

    def __init__(self, request: Any, tokens: int) -> None:
        self._request, self.num_tokens = request, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _update_from_output(original: Any, self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
    snapshot = getattr(model_runner_output, ON_OUTPUT, None)
    gate = getattr(self, MINE)
    if snapshot is None or gate is None:
        return original(self, scheduler_output, model_runner_output)
    values = snapshot.slices()
    may_end = {name for name in values if gate.may_end(name)}  # asked now: those that end leave the gate
    clients = {name: self.requests[name].client_index for name in snapshot.failed() if name in self.requests}
    outbox = gate.outbox
    here = {name: rows for name, rows in snapshot.reads.items() if name in self.requests}
    outbox.put(here, [name for name in snapshot.stops if name in here])
    reads = {name: outbox.take(name) for name in values}
    stops = {name for name in values if outbox.stops(name)}
    outputs = original(self, scheduler_output, model_runner_output)
    running = {name: sums for name, sums in values.items() if name not in clients}
    ended = _tell(outputs, running, may_end, stops, reads)
    outbox.put({name: rows for name, rows in reads.items() if rows is not None and name in self.requests}, ())
    if ended:
        self.finish_requests(ended, RequestStatus.FINISHED_STOPPED)
    if clients:
        self.finish_requests(list(clients), RequestStatus.FINISHED_ERROR)
    for name, client in clients.items():
        batch = outputs.setdefault(client, EngineCoreOutputs())
        batch.outputs = [output for output in batch.outputs if output.request_id != name]
        failed = EngineCoreOutput(request_id=name, new_token_ids=[], finish_reason=FinishReason.ERROR)
        _attach(failed, payload_of(values.get(name), snapshot.errors.get(name)))
        batch.outputs.append(failed)
    return outputs


def _tell(outputs: Any, values: Any, may_end: set[str], stops: set[str], reads: dict[str, Any]) -> list[str]:
    """Puts on each output what its request did, taking it from ``reads``; the requests that a trigger ends here."""
    ended = []
    for output in (output for batch in outputs.values() for output in batch.outputs):
        name = output.request_id
        if name not in values:
            continue
        if name in stops and output.finish_reason is None:
            # Not STOP: the front end would take the last token for one that is not told. It knows better below.
            output.finish_reason = FinishReason.LENGTH
            ended.append(name)
        told = output.finish_reason is not None or name in may_end
        payload = payload_of(values[name] if told else None, reads=reads.pop(name, None))
        if payload:
            _attach(output, payload)
    return ended


def _attach(output: Any, payload: dict[str, Any]) -> None:
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), **payload}


# The front end: from a request to a program, and back.


def _input_init(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    setattr(self, MINE, frontend_of(vllm_config))  # first: the start is refused before anything is loaded
    original(self, vllm_config, *args, **kwargs)


def _process_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)
    params = request.sampling_params
    if params is None or not params.extra_args:
        return request
    try:
        told = Told(len(request.prompt_token_ids or ()), params.max_tokens, params.n)
        extra = admit(getattr(self, MINE), params.extra_args, told)
        if extra and PROGRAM in extra and (request.prompt_embeds is not None or request.resumable):
            raise RequestError("steering: this engine steers prompts of tokens, which are whole.", param="steering")
    except RequestError as error:
        raise Refused(error) from None
    params.extra_args = extra
    return request


def _follow(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    if extra and ASK in extra:
        # vLLM still takes requests of the engine's own form, which its front end does not look into.
        error = RequestError("steering: this request did not come through vLLM's front end.", param="steering")
        raise Refused(error)
    follow = None
    if extra and PROGRAM in extra:
        frontend: Frontend = getattr(self, MINE)
        # Before vLLM knows of the request: what is raised here leaves nothing behind.
        follow = frontend.follow(extra[PROGRAM], extra.get(TICKET), len(request.prompt_token_ids), self.tokenizer)
    original(self, request, *args, **kwargs)
    if follow is not None:
        state = self.request_states[request.request_id]
        setattr(state, MINE, follow)
        follow.register(state.external_req_id, state.request_index)


def _engine_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    setattr(self.output_processor, MINE, getattr(self.input_processor, MINE))


def _process_outputs(original: Any, self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
    failed: list[str] = []
    for output in engine_core_outputs:
        if output.kv_transfer_params:
            mine, output.kv_transfer_params = take(output.kv_transfer_params)
            follow = getattr(self.request_states.get(output.request_id), MINE, None)
            if mine and follow is not None:
                follow.take(mine)
                if follow.failure is not None and output.finish_reason is None:
                    # The engine does not know of it, as of a stop string that the detokenizer found.
                    output.finish_reason = FinishReason.ERROR
                    failed.append(output.request_id)
    result = original(self, engine_core_outputs, *args, **kwargs)
    result.reqs_to_abort.extend(failed)
    return result


def _completion_output(original: Any, self: Any, token_ids: Any, finish_reason: Any, *args: Any, **kwargs: Any) -> Any:
    follow = getattr(self, MINE, None)
    if follow is not None and finish_reason == FinishReason.LENGTH and follow.stopped:
        finish_reason = FinishReason.STOP
    completion = original(self, token_ids, finish_reason, *args, **kwargs)
    if follow is not None and finish_reason is not None:
        completion.steering = follow.finish(self.external_req_id, self.request_index)
    return completion


def _to_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    by_hand = (self.vllm_xargs or {}).get(ASK)
    if "steering" in (self.model_extra or ()) or not (by_hand is None or is_ticket(by_hand)):
        # The middleware puts a ticket in place of the field: this request came another way, as a batch file's do, where
        # nobody would report what was done, and a beam search would not even do it.
        error = RequestError("steering: requests that come this way cannot be steered.", param="steering")
        raise Refused(error)
    return original(self, *args, **kwargs)


def _load_endpoint_plugins(original: Any, *args: Any, **kwargs: Any) -> Any:
    from sae_steer_vllm.endpoint import NAME, Refusing

    plugins = original(*args, **kwargs)
    return plugins if any(plugin.name == NAME for plugin in plugins) else [*plugins, Refusing()]


# The model: tables, hooks and the step's map. One adapter for each of vLLM's model runners.


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


def _describe(self: Any) -> dict[str, Any] | None:
    """What a worker has, asked by the front end over ``collective_rpc``."""
    worker: Worker | None = getattr(self.model_runner, MINE, None)
    return worker.describe() if worker is not None else None


def _harvest(self: Any, command: str, payload: bytes) -> bytes | bool | None:
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


def offline_engine(options: dict[str, Any]) -> tuple[Any, Callable[[dict[str, Any]], Any]]:
    """``vllm.LLM``, and what makes the parameters of a request of one token from its ``extra_args``."""
    from vllm import LLM, SamplingParams

    def params(extra_args: dict[str, Any]) -> Any:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=extra_args)

    return LLM(**options), params


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
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"
_COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest"
_WRAPPERS: dict[str, Callable[..., Any]] = {
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": _block_keys,
    f"{_SCHEDULER}.__init__": _scheduler_init,
    f"{_SCHEDULER}.add_request": _add_request,
    f"{_SCHEDULER}.finish_requests": _finish_requests,
    f"{_SCHEDULER}._free_request": _free_request,
    f"{_SCHEDULER}.update_from_output": _update_from_output,
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": _cached_blocks,
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": _preprocess,
    "vllm.v1.engine.input_processor:InputProcessor.__init__": _input_init,
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": _process_inputs,
    "vllm.v1.engine.async_llm:AsyncLLM.__init__": _engine_init,
    "vllm.v1.engine.llm_engine:LLMEngine.__init__": _engine_init,
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": _follow,
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": _process_outputs,
    "vllm.v1.engine.output_processor:RequestState._new_completion_output": _completion_output,
    "vllm.plugins:load_endpoint_plugins": _load_endpoint_plugins,
    f"{_CHAT}.to_sampling_params": _to_params,
    f"{_CHAT}.to_beam_search_params": _to_params,
    f"{_COMPLETION}.to_sampling_params": _to_params,
    f"{_COMPLETION}.to_beam_search_params": _to_params,
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
