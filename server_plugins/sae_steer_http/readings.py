"""How much one answer may read: refused before it runs where that can be told, else ended with an error."""

from collections.abc import Iterable

from sae_steer.errors import LimitExceeded, ReadingsExceeded
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.readings import computed_values, reading_values

COMPUTED = 64
"""How many numbers a server keeps at most for an answer, for each that it sends: what is only summed up costs too."""


def check_reading_size(
    program: Program | None, limits: Limits, prompt_lengths: Iterable[int], max_tokens: int | None, *, choices: int
) -> None:
    """Refuses a request whose answer would have to send back more activations than the server allows.

    Args:
        program: What the request asks.
        limits: What the server holds.
        prompt_lengths: Tokens of each prompt.
        max_tokens: Completion tokens of each choice; None = the client did not say, and only the prompt counts.
        choices: Answers to each prompt.

    Raises:
        LimitExceeded: It asks for more.
    """
    if program is None or not program.readings:
        return
    lengths = list(prompt_lengths)
    wanted = choices * sum(reading_values(program, length, max_tokens or 1) for length in lengths)
    computed = choices * sum(computed_values(program, length, max_tokens or 1) for length in lengths)
    if wanted > limits.max_reading_values:
        raise LimitExceeded(
            f"steering.readings: the answer could hold {wanted} activations (tokens times values of each), and this "
            f"server sends at most {limits.max_reading_values}. Read fewer features or tokens, lower 'max_tokens', or "
            "set 'per_token' to false.",
            param="steering.readings",
        )
    if computed > COMPUTED * limits.max_reading_values:
        raise LimitExceeded(
            f"steering.readings: the answer could sum up {computed} numbers (tokens times all that is read of each), "
            f"and this server keeps at most {COMPUTED * limits.max_reading_values} for one. Read fewer features or "
            "tokens, or lower 'max_tokens'.",
            param="steering.readings",
        )


class ReadingBudget:
    """Counts what one answer sends back.

    Args:
        limits: What the server holds.
    """

    def __init__(self, limits: Limits) -> None:
        self._left, self._kept = limits.max_reading_values, COMPUTED * limits.max_reading_values

    def take(self, values: int, computed: int) -> None:
        """Counts activations that are about to be sent, and numbers that were kept for them and for summaries.

        Raises:
            ReadingsExceeded: One of them is beyond the limit.
        """
        self._left -= values
        self._kept -= computed
        if self._left < 0 or self._kept < 0:
            raise ReadingsExceeded(
                "The answer's readings have passed the server's limit, and it was ended rather than cut. Give "
                "'max_tokens', read fewer features or tokens, or set 'per_token' to false.",
                param="steering.readings",
            )
