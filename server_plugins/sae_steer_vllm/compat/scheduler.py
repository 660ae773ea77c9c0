"""In the engine: slots, the keys of the prefix cache, and the way back of what was done."""

from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from sae_steer.errors import RequestError, StartError
from sae_steer.footprint import Footprint
from sae_steer.program import Program
from sae_steer.slots import Slot, buckets_of
from sae_steer.wire import check, parse
from sae_steer_vllm.channel import ASK, ON_OUTPUT, PROGRAM, SLOT, payload_of
from sae_steer_vllm.compat.versions import MINE, configured
from sae_steer_vllm.config import catalog_of
from sae_steer_vllm.gate import Gate
from sae_steer_vllm.refusals import refuse_setup


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


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
WRAPPERS: dict[str, Callable[..., Any]] = {
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": _block_keys,
    f"{_SCHEDULER}.__init__": _scheduler_init,
    f"{_SCHEDULER}.add_request": _add_request,
    f"{_SCHEDULER}.finish_requests": _finish_requests,
    f"{_SCHEDULER}._free_request": _free_request,
    f"{_SCHEDULER}.update_from_output": _update_from_output,
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": _cached_blocks,
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": _preprocess,
}
