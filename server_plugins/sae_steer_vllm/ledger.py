"""What of vLLM the plugin touches: what, why, in which versions, and what would make it unnecessary.

:mod:`.compat` does the touching; a test holds the two together.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Symbol:
    """One thing of vLLM that the plugin wraps or calls.

    Args:
        where: Module and qualified name.
        why: What for.
        note: What differs between the versions.
        until: What would make it unnecessary.
    """

    where: str
    why: str
    note: str = ""
    until: str = ""


_SEAM = "a seam in vLLM for per-request model edits"
LEDGER: tuple[Symbol, ...] = (
    Symbol(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        "keeps steered and unsteered blocks of the prefix cache apart",
        "keys are bare up to 0.30 and pairs from 0.31; a pair is good in all",
        "extra block keys as a request's own field",
    ),
    Symbol("vllm.v1.core.sched.scheduler:Scheduler.__init__", "makes the gate", until=_SEAM),
    Symbol(
        "vllm.v1.core.sched.scheduler:Scheduler.add_request", "gives a request its slot, or has it wait", until=_SEAM
    ),
    Symbol("vllm.v1.core.sched.scheduler:Scheduler.finish_requests", "ends requests that wait for a slot", until=_SEAM),
    Symbol("vllm.v1.core.sched.scheduler:Scheduler._free_request", "gives the slot back", until=_SEAM),
    Symbol(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "sends sums to the front end, and ends requests that failed",
        until="an open field on EngineCoreOutput",
    ),
    Symbol(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        "asks the prefix cache for nothing from the first position on that a request has read",
        until="a longest hit as a request's own field",
    ),
    Symbol(
        "vllm.v1.engine.core:EngineCore.preprocess_add_request",
        "checks a program again, where a fault ends that request alone",
        until=_SEAM,
    ),
    Symbol("vllm.v1.engine.input_processor:InputProcessor.__init__", "reads the configuration", until=_SEAM),
    Symbol(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "compiles what a request asks",
        "keyword arguments were added in 0.28 and 0.31; from 0.27 it may run in a thread",
        _SEAM,
    ),
    Symbol("vllm.v1.engine.output_processor:OutputProcessor.add_request", "follows steered requests", until=_SEAM),
    Symbol(
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        "takes the sums from the outputs",
        "0.32 adds weight_version",
        "an open field on EngineCoreOutput",
    ),
    Symbol(
        "vllm.v1.engine.output_processor:RequestState._new_completion_output",
        "puts the report on the choice",
        until="an open field on CompletionOutput",
    ),
    Symbol(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        "refuses the field where no middleware took it out (batch files)",
    ),
    Symbol(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
        "the same for a beam search",
    ),
    Symbol(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params",
        "the same for completions",
    ),
    Symbol(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params",
        "the same for a beam search",
    ),
    Symbol("vllm.v1.engine.async_llm:AsyncLLM.__init__", "joins the front end's two halves", until=_SEAM),
    Symbol("vllm.v1.engine.llm_engine:LLMEngine.__init__", "the same for LLM", until=_SEAM),
    Symbol(
        "vllm.v1.worker.worker_base:WorkerBase",
        "gains sae_steer_describe, for the start's handshake, and sae_steer_harvest, for calibration",
        until=_SEAM,
    ),
    Symbol("vllm:LLM", "runs the texts of a calibration"),
    Symbol("vllm:SamplingParams", "says of each which of its tokens are observed"),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.load_model",
        "hooks the model (V1 runner)",
        "0.32 adds model=",
        "a hook after load_model",
    ),
    Symbol(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "the same: it overrides the above and does not call it",
        until="a hook after load_model",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
        "lays out the step's map once the batch is in order (V1 runner)",
        "returns two values in 0.26 and three from 0.28",
        "a per-step hook with the batch",
    ),
    Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model", "begins and ends a step (V1 runner)"),
    Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens", "puts the sums on the output (V1 runner)"),
    Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model", "hooks the model (V2 runner)"),
    Symbol(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs",
        "lays out the step's map (V2 runner)",
        "arguments were added in 0.28 and 0.31; the InputBatch it returns has what is needed in all",
        "ModelState, once its methods see the batch of every step",
    ),
    Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model", "begins and ends a step (V2 runner)"),
    Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens", "puts the sums on the output (V2 runner)"),
    Symbol(
        "vllm.plugins:load_endpoint_plugins",
        "adds the refusal of steered requests where the endpoint plugin was not named",
    ),
    Symbol("vllm.config:CompilationConfig.static_forward_context", "where the op finds its site, as attention does"),
    Symbol("vllm.forward_context:get_forward_context", "the same, while the model runs"),
    Symbol(
        "vllm.distributed.parallel_state:get_tp_group",
        "asks, where a slot is filled, whether every rank of tensor parallelism could",
    ),
    Symbol("vllm.exceptions:VLLMValidationError", "what the front end answers with 400", "a ValueError in 0.26 only"),
    Symbol("vllm.v1.outputs:EMPTY_MODEL_RUNNER_OUTPUT", "shared by all idle steps, so never written to"),
    Symbol("vllm.v1.engine:EngineCoreOutput", "ends a request that failed, with its sums and its error"),
    Symbol("vllm.v1.engine:EngineCoreOutputs", "the same, for a client that had no output in the step"),
    Symbol("vllm.v1.engine:FinishReason", "how such a request ends"),
    Symbol("vllm.v1.request:RequestStatus", "the same, for the scheduler"),
    Symbol("vllm.logger:init_logger", "the plugin's lines in vLLM's log"),
    Symbol("vllm.sequence:IntermediateTensors", "carries sums from stage to stage of a pipeline"),
)
