"""One vLLM engine in a process of its own: requests come in on standard input, a line each, and answers go out.

It is a program, and not a fixture, because vLLM reads its environment once a process and sets up the whole process for
its workers. The first line is an :class:`EngineSettings`, as JSON; each later one asks what :meth:`Path.run` is called
with.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TextIO

from tests.conformance.answers import Asked, Choice, read_part
from tests.conformance.wrong import switched_on

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is started.

    Args:
        model: Folder of the model.
        plugin: The plugin's configuration.
        options: Of ``vllm.LLM``.
        v2: Whether it is V2's model runner, under Triton's interpreter.
    """

    model: str
    plugin: dict[str, Any]
    options: dict[str, Any]
    v2: bool


def main() -> None:
    """Starts the engine and answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints, in all of its processes, is no answer
    settings = EngineSettings(**json.loads(sys.stdin.readline()))
    if settings.v2:
        register_interpreter()
    from vllm import LLM

    from sae_steer_vllm.offline import additional_config

    llm = LLM(settings.model, additional_config=additional_config(settings.plugin), **settings.options)
    _tell(answers, "ready")
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["cold"] and not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use")
        waves = [[Asked(**each) for each in wave] for wave in asked["waves"]]
        with switched_on(asked["wrong"]):
            _tell(answers, [[[asdict(c) for c in choices] for choices in _wave(llm, wave)] for wave in waves])


def _tell(answers: TextIO, value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _wave(llm: "LLM", wave: list[Asked]) -> list[list[Choice]]:
    from vllm import SamplingParams, TokensPrompt

    from sae_steer_vllm.offline import steered

    params = [
        SamplingParams(
            n=each.choices,
            # vLLM has no greedy choices beside each other; of those left by a min_p of 1 there is one.
            temperature=float(each.choices > 1),
            min_p=float(each.choices > 1),
            max_tokens=each.tokens,
            logprobs=0,
            extra_args=steered(each.steering) if each.steering is not None else None,
        )
        for each in wave
    ]
    prompts = [TokensPrompt(prompt_token_ids=each.prompt) for each in wave]
    return [_choices(output) for output in llm.generate(prompts, params, use_tqdm=False)]


def _choices(output: "RequestOutput") -> list[Choice]:
    found = []
    for choice in output.outputs:
        block = getattr(choice, "steering", None) or {}
        tokens = list(choice.token_ids)
        logprobs = [at[token].logprob for token, at in zip(tokens, choice.logprobs or (), strict=True)]
        error = block.get("error", {}).get("code")
        cached = output.num_cached_tokens or 0
        found.append(Choice(tokens, logprobs, block.get("applied"), error, cached, read_part(block)))
    return found


def register_interpreter() -> None:
    """Makes Triton's interpreter run on a CPU, for V2's model runner; before vllm is imported."""
    import triton.backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        """A processor that only the interpreter uses: it is there, and nobody asks it for anything more."""

        @classmethod
        def is_active(cls) -> Any:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_current_target(self) -> Any:
            raise NotImplementedError

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=BaseBackend, driver=Driver)

    from vllm.triton_utils import tl, tldevice
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner

    # 0.28 and 0.30 make the noise of a draw with it, and the interpreter has none.
    tldevice.log1p = lambda x: tl.log(1.0 + x)
    # A warm-up's attention leaves what was in the memory, and where that is NaN, the interpreter cannot draw a token.
    CPUModelRunner.warming_up_model = lambda self: None


if __name__ == "__main__":
    main()
