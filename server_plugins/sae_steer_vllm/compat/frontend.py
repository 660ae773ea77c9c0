"""In the front end: from a request to a program, and from what was done to a report."""

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FinishReason

from sae_steer.calibration.model import of_source
from sae_steer.capabilities import VLLM
from sae_steer.errors import RequestError
from sae_steer_vllm.channel import ASK, PROGRAM, TICKET, is_ticket, take
from sae_steer_vllm.compat.versions import MINE, configured
from sae_steer_vllm.config import catalog_of
from sae_steer_vllm.frontend import Frontend, Told, admit
from sae_steer_vllm.refusals import refuse_setup


class Refused(RequestError, VLLMValidationError):
    """A request that cannot be honoured, as vLLM's own front end knows such errors."""

    def __init__(self, error: RequestError) -> None:
        RequestError.__init__(self, error.message, param=error.param, code=error.code)
        self.parameter, self.value = error.param, None

    def __str__(self) -> str:
        return self.message


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


_CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"
_COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest"
WRAPPERS: dict[str, Callable[..., Any]] = {
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
}
