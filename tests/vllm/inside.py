"""What the tests do inside an engine's process: functions that :meth:`tests.vllm.engine_script.Host.run` is given."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_steer.token_texts import TokenTexts
from tests.vllm.engine_script import Answer, Ask, Json, answers_of, empty_cache, scheduler_of, start_llm


def start_with_processor(config: Json, options: Mapping[str, Any]) -> Any:
    """Starts ``LLM`` with a logits processor that bans the token ``extra_args.ban`` of a request."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Ban(AdapterLogitsProcessor):
        """The processor."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Any], Any] | None:
            banned = (params.extra_args or {}).get("ban")

            def ban(_: list[int], logits: Any) -> Any:
                logits[banned] = float("-inf")
                return logits

            return ban if banned is not None else None

    return start_llm(config, {"logits_processors": [Ban], **options})


def start_async(config: Json, options: Mapping[str, Any]) -> Any:
    """Starts ``LLM`` with asynchronous scheduling, which vLLM switches off on a CPU, although it runs there."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check(cls: type, config: Any) -> None:
        original(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check)  # type: ignore[assignment,method-assign]
    llm = start_llm(config, options)
    assert type(scheduler_of(llm)).__name__ == "AsyncScheduler"
    assert llm.llm_engine.engine_core.engine_core.batch_queue is not None
    return llm


@dataclass
class Stepped:
    """What happened while requests ran.

    Args:
        answers: By the request's number; None = it was aborted.
        preempted: How far each request that was preempted had come: tokens of its completion, each time.
        waiting: How many requests waited for a slot, after each step.
        slots: How many slots were held, after each step.
        running: How many requests ran together, at most.
    """

    answers: list[list[Answer] | None]
    preempted: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    waiting: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    running: int = 0


class Stepper:
    """Runs requests step by step.

    Args:
        llm: The engine.
        asked: The requests; more may come.
    """

    def __init__(self, llm: Any, asked: Sequence[Ask]) -> None:
        empty_cache(llm)
        self._engine = llm.llm_engine
        self._scheduler = scheduler_of(llm)
        self._gone: set[int] = set()
        self.seen = Stepped([])
        self._preempt = self._scheduler._preempt_request
        self._scheduler._preempt_request = self._preempted
        for each in asked:
            self.add(each)

    def add(self, ask: Ask) -> None:
        """Sends another request."""
        number = len(self.seen.answers)
        self.seen.answers.append(None)
        self._engine.add_request(
            f"r{number}", {"prompt_token_ids": list(ask.prompt)}, ask.params(), lora_request=ask.lora_request(),
            priority=ask.priority,
        )  # fmt: skip

    def _preempted(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        number = int(request.request_id.rpartition("r")[2].split("-")[0])
        self.seen.preempted[number].append(request.num_output_tokens)
        return self._preempt(request, *args, **kwargs)

    def step(self) -> None:
        """One step of the engine."""
        for output in self._engine.step():
            if output.finished:
                self.seen.answers[int(output.request_id[1:])] = answers_of(output)
        self.look()

    def look(self) -> None:
        """Writes down where the slots are."""
        gate = self._scheduler._sae_steer
        self.seen.waiting.append(gate.waiting)
        self.seen.slots.append(gate.slots_in_use)
        self.seen.running = max(self.seen.running, len(self._scheduler.running))

    def abort(self, numbers: Sequence[int]) -> None:
        """Aborts requests, as a client does that hangs up."""
        self._engine.abort_request([f"r{number}" for number in numbers])
        self.look()

    def finish(self) -> Stepped:
        """Runs to the end of all requests."""
        while self._engine.has_unfinished_requests():
            self.step()
        del self._scheduler._preempt_request
        self.seen.preempted = dict(self.seen.preempted)
        return self.seen


def stepped(llm: Any, asked: Sequence[Ask]) -> Stepped:
    """Answers requests that are sent together."""
    return Stepper(llm, asked).finish()


def aborted(llm: Any, asked: Sequence[Ask], gone: Sequence[int], later: Sequence[Ask]) -> Stepped:
    """Aborts some of the requests after some steps, and sends others then."""
    stepper = Stepper(llm, asked)
    for _ in range(6):
        stepper.step()
    stepper.abort(gone)
    for ask in later:
        stepper.add(ask)
    return stepper.finish()


def emptied(llm: Any, asked: Sequence[Ask], every: int) -> Stepped:
    """Answers requests that are sent together; every so many steps the prefix cache is emptied under them."""
    stepper = Stepper(llm, asked)
    while llm.llm_engine.has_unfinished_requests():
        for _ in range(every):
            stepper.step()
        llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    return stepper.finish()


def token_texts(llm: Any, folder: str, text: str) -> list[str]:
    """The texts of a text's tokens, by vLLM's own class for the tokenizer of Mistral's that is in a folder."""
    from vllm.tokenizers.mistral import MistralTokenizer

    tokenizer: Any = MistralTokenizer.from_pretrained(folder)
    texts = TokenTexts(tokenizer)
    return [texts.text(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def replaced(llm: Any, ask: Ask, file: str, text: str) -> Stepped:
    """Sends a request, rewrites a file while it runs, and sends the same again."""
    stepper = Stepper(llm, [ask])
    for _ in range(5):
        stepper.step()
    other = Path(file).with_suffix(".new")
    other.write_text(text)
    other.replace(file)
    stepper.add(ask)
    return stepper.finish()


def chat(llm: Any, messages: list[Json], ask: Ask, **options: Any) -> tuple[list[int], list[Answer]]:
    """Answers a chat by ``LLM.chat``; the prompt's tokens, and the answer."""
    empty_cache(llm)
    [output] = llm.chat([messages], ask.params(), use_tqdm=False, **options)
    return list(output.prompt_token_ids), answers_of(output)


def resumable(llm: Any, ask: Ask) -> None:
    """Sends a request whose prompt will go on, as streams of prompts are sent."""
    engine = llm.llm_engine
    prompt = {"prompt_token_ids": list(ask.prompt)}
    engine.input_processor.process_inputs("s", prompt, ask.params(), engine.get_supported_tasks(), resumable=True)


def embeddings(llm: Any, ask: Ask) -> None:
    """Sends a prompt of embeddings."""
    import torch

    llm.generate([{"prompt_embeds": torch.zeros(3, 192)}], ask.params(), use_tqdm=False)


def handmade(llm: Any, ask: Ask) -> None:
    """Sends a request of the engine's own form, as ``LLMEngine.add_request`` still takes them."""
    engine = llm.llm_engine
    plain = Ask(ask.prompt).params()
    request = engine.input_processor.process_inputs(
        "h", {"prompt_token_ids": list(ask.prompt)}, plain, engine.get_supported_tasks()
    )
    request.sampling_params.extra_args = ask.params().extra_args
    engine.add_request("h", request, plain)


def beams(llm: Any, ask: Ask) -> None:
    """Asks for a steered beam search."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=2, extra_args=ask.params().extra_args)  # type: ignore[call-arg]
    llm.beam_search([{"prompt_token_ids": list(ask.prompt)}], params)


def beams_of_samples(llm: Any, ask: Ask) -> None:
    """Hands the parameters of a steered request to beam search."""
    llm.beam_search([{"prompt_token_ids": list(ask.prompt)}], ask.params())


def pooled(llm: Any, ask: Ask) -> None:
    """Asks for an embedding with the parameters of a steered request."""
    llm.encode([{"prompt_token_ids": list(ask.prompt)}], ask.params(), pooling_task="embed", use_tqdm=False)


def unfinished(llm: Any) -> tuple[bool, int, int]:
    """Whether requests are left in the engine, how many hold a slot, and how many wait for one."""
    gate = scheduler_of(llm)._sae_steer
    return llm.llm_engine.has_unfinished_requests(), gate.slots_in_use, gate.waiting
