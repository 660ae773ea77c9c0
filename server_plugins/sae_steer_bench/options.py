"""What a run is told, and whom it tells how it goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_steer_bench.records import Measurement, Plan


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Args:
        command: The command line itself.
        folder: Where everything is written.
        url: A server that is there; None = one is launched.
        launch: The command that launches it.
        plain_url: The same server without the plugin, where one is there.
        model: What requests call the model; None = the first that is listed.
        api_key: Bearer key.
        admin_key: Key of what changes the server's state.
        generator: Who sends requests; None = ``vllm`` for vLLM where it is installed, else ``openai``.
        tokenizer: For ``vllm``; None = the model's own, as the server names it.
        concurrency: Most requests at once.
        rates: Requests a second, a load for each; 0 = half of what the closed loop reaches.
        prompt_tokens: Token ids in each prompt.
        output_tokens: Completion tokens.
        requests: Of one measurement; None = as many as there is time for.
        rounds: Most rounds.
        minutes: After which no further round is begun, once there are five.
        quick: Whether only the most telling cases are measured.
        cases: Keys of those that are measured; none = all.
        value: What features are clamped to.
        seed: Of the order, the prompts and the intervals.
        profile: Whether a trace of one step is taken in the end.
        timeout: Seconds that an answer may take.
        start_timeout: Seconds that a launched server may take to be ready.
    """

    command: str
    folder: Path
    url: str | None = None
    launch: str | None = None
    plain_url: str | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    generator: str | None = None
    tokenizer: str | None = None
    concurrency: int = 64
    rates: tuple[float, ...] = ()
    prompt_tokens: int = 64
    output_tokens: int = 32
    requests: int | None = None
    rounds: int = 100
    minutes: float = 3.0
    quick: bool = False
    cases: tuple[str, ...] = ()
    value: float = 1.0
    seed: int = 0
    profile: bool = False
    timeout: float = 600.0
    start_timeout: float = 900.0


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how it goes.

    Args:
        say: A line of text.
        step: Round, number of the measurement in it, measurements in it, label.
        plan: The plan, once it is made.
        rounds: All measurements of complete rounds, after each of them.
    """

    say: Callable[[str], None]
    step: Callable[[int, int, int, str], None]
    plan: Callable[[Plan], None]
    rounds: Callable[[Sequence[Measurement]], None]
