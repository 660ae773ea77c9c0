"""The seam: the only file that touches ``transformers.generation.continuous_batching`` (tried with 5.19).

What it touches beyond ``init_continuous_batching``, ``add_request``, ``cancel_request``, ``start``, ``stop``, and why:

* ``manager.logit_processor``: sampling is per manager; ours, one processor for all, samples per request.
* ``ContinuousBatchingLogitsProcessorList.tensors_required``: only built-in processors are counted into it.
* ``ContinuousBatchingLogitsProcessor``: its methods receive the requests that get a token, and their logits.
* ``manager.output_router``, ``OutputRouter.deliver`` and ``deliver_batch``: tokens in the engine's thread, before the
  next batch is laid out, so that what is cancelled there takes part in no further forward pass.
* ``manager.warmup``, ``manager.batch_processor``: make the cache and the scheduler now, so that what does not fit
  refuses the start. Without graphs ``warmup`` runs nothing.
* ``batch_processor.cache`` and ``.inputs_and_outputs.requests_in_batch``: which calls of the model are the batch's, and
  whose their tokens are. ``FutureRequestState.state.position_offset`` is past the span already when the model runs.
* ``RequestState(...)``, ``cache.can_store_request_tokens``: whether one longest request fits; one that does not would
  end the engine's thread when it is scheduled.
* ``cache.update``: each layer's new keys and values, to keep what is not finite from the neighbours.
* ``scheduler.clear_cancelled_requests``: returns the requests that the scheduler lets go of, between forward passes.
* ``scheduler.block_new_requests``: stays set for ever where all requests are cancelled after the cache was full.
* ``manager._generation_thread``: to learn that it ended.

Prefix sharing is off: both ``search_prefix_match`` and ``mark_complete_blocks`` would hand keys and values that were
computed under one program to another.
"""

import threading
from collections.abc import Collection, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
)
from transformers.generation.continuous_batching.scheduler import Scheduler

from sae_steer.errors import EngineDown, StartError
from sae_steer_server.engine.isolation import FiniteRows
from sae_steer_server.engine.steps import Part, Steps

_PAGE = 16  # tokens
_STEP_TOKENS = 512  # the attention mask is dense, [tokens of a step, tokens in the cache]: it bounds both
MAX_KV_TOKENS = 2**16


class Batch:
    """A model under transformers' continuous batching.

    Args:
        model: The model.
        steps: What is done around each forward pass.
        eos: Token ids that end a sequence.
        max_running: Most requests in one forward pass.
        max_model_len: Longest prompt with its completion.
        kv_tokens: Tokens that the cache holds; None = what ``max_running`` longest requests take, up to
            ``MAX_KV_TOKENS``. A full cache delays requests and changes no answer.

    Raises:
        StartError: The cache does not fit into memory, or one longest request does not fit into the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        steps: Steps,
        *,
        eos: Collection[int],
        max_running: int,
        max_model_len: int,
        kv_tokens: int | None = None,
    ) -> None:
        self._steps = steps
        self._finite = FiniteRows()
        wanted = kv_tokens or max(max_model_len, min(max_running * max_model_len, MAX_KV_TOKENS))
        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=ceil(wanted / _PAGE),
            max_batch_tokens=max(max_running, _STEP_TOKENS),
            max_requests_per_batch=max_running,
            max_blocks_per_request=0,  # the block-table path wants pages of its own size
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=sorted(eos) or -1)  # type: ignore[no-untyped-call]
        # A mixin that the model's type does not show.
        self._manager: ContinuousBatchingManager = model.init_continuous_batching(greedy, config)  # type: ignore[operator]
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Chooser(steps)]))
        processors.tensors_required = 1
        self._manager.logit_processor = processors
        self._manager.output_router = _Router(steps)
        self._make_processor(wanted, max_model_len)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _make_processor(self, wanted: int, max_model_len: int) -> None:
        try:
            self._manager.warmup()
        except MemoryError as error:
            raise StartError(
                f"A key-value cache of {wanted} tokens does not fit into memory ({error}). Serve fewer requests at "
                "once, shorter ones, or set the cache's size."
            ) from error
        processor = self._manager.batch_processor
        assert processor is not None  # made by warmup
        assert isinstance(processor.inputs_and_outputs, ContinuousBatchingIOs)  # not the asynchronous ones
        self._cache, self._in_and_out = processor.cache, processor.inputs_and_outputs
        longest = RequestState("longest", [0])
        if not self._cache.can_store_request_tokens(longest, max_model_len, dry_run=True):
            raise StartError(
                f"A key-value cache of {wanted} tokens does not hold one request of {max_model_len}. Set a "
                "larger one, or serve shorter requests."
            )
        self._wrap(processor.scheduler)

    def _wrap(self, scheduler: Scheduler) -> None:
        cache: Any = self._cache  # the decorator of its method is not typed
        clear, update = scheduler.clear_cancelled_requests, cache.update

        def clear_and_tell() -> list[RequestState]:
            states: list[RequestState] = clear()
            for state in states:
                self._steps.dropped(state.request_id)
            if states:
                # Set when the cache was full, and taken back by the host only where a request ends by itself: with
                # every running request cancelled, nothing would ever be scheduled again.
                scheduler.block_new_requests = False
            return states

        def update_with_finite(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return update(self._finite.clean(key_states), self._finite.clean(value_states), *args, **kwargs)

        scheduler.clear_cancelled_requests = clear_and_tell  # type: ignore[method-assign]
        cache.update = update_with_finite

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._manager.is_running()

    def start(self) -> threading.Thread:
        """Starts and returns the engine's thread."""
        self._manager.start()
        thread = self._manager._generation_thread
        assert thread is not None  # just started
        return thread

    def add(self, id_: str, prompt: Sequence[int], max_tokens: int, *, eos: Collection[int]) -> None:
        """Hands a request to the scheduler. Raises :class:`EngineDown` where it takes none any more."""
        ends = sorted(eos) or -1
        if self._manager.add_request(list(prompt), id_, max_tokens, streaming=True, eos_token_id=ends) is None:
            raise EngineDown("The engine has stopped; nothing can be answered.")

    def cancel(self, id_: str) -> None:
        """Asks the scheduler to let go of a request; it does so before it lays out the next batch."""
        self._manager.cancel_request(id_)

    def stop(self) -> None:
        """Ends the engine's thread after the forward pass that runs, and takes the hooks out of the model. Blocks."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("cache") is not self._cache:
            return  # somebody else's call of the model
        parts = [
            Part(each.state.request_id, each.state.position_offset - each.query_length, each.query_length)
            for each in self._in_and_out.requests_in_batch
        ]
        self._steps.begin(parts, kwargs["input_ids"][0].tolist())

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if kwargs.get("cache") is self._cache:
            self._steps.end(self._finite.take())


class _Router(OutputRouter):
    """Hands outputs to the steps, in the engine's thread."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps

    def deliver(self, output: GenerationOutput) -> None:
        self._steps.deliver(
            output.request_id, output.generated_tokens, finished=output.is_finished(), error=output.error
        )

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class _Chooser(ContinuousBatchingLogitsProcessor):
    """Lets the steps choose each token: the manager's argmax then takes it."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  # transformers' own, merged into a table by it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._positions: list[tuple[str, int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        # Once per batch, right before its forward pass; the new token's position is the number of tokens before it.
        self._positions = [(each.state.request_id, each.state.position_offset) for each in requests_with_new_token]
        return torch.zeros(len(self._positions), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # type: ignore[override]  # theirs says FloatTensor
        return self._steps.choose(self._positions, scores)
