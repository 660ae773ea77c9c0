"""How a request's next token is drawn from its logits: temperature, nucleus, and a counter in place of a state.

The number drawn for a token depends on the request's seed and the token's absolute position alone (Philox is a counter
through a cipher: Salmon et al. 2011), so neighbours, preemption and arrival time cannot change what is sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Philox
from torch import Tensor

from sae_steer.errors import RequestError

MAX_LOGPROBS = 20
_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a completion is made.

    Args:
        max_tokens: Most completion tokens.
        temperature: 0 = always the most likely token.
        top_p: Mass of the nucleus; 1 = every token.
        seed: Any integer, taken modulo 2^64.
        stop: Texts that end the completion and are not part of it.
        logprobs: None = no log-probabilities; n = the chosen token's and those of the n most likely.
        ignore_eos: Whether tokens that end a sequence are tokens like any other.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def check(self) -> None:
        """Raises :class:`RequestError` for what could not be sampled."""
        checks = (
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "a finite number from 0"),
            (0 <= self.top_p <= 1, "top_p", "from 0 to 1"),
            (all(self.stop), "stop", "made of texts that are not empty"),
            (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, "logprobs", f"from 0 to {MAX_LOGPROBS}"),
        )
        for holds, name, rule in checks:
            if not holds:
                raise RequestError(f"{name} must be {rule}.", param=name)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that chooses the token at an absolute position."""
    bits = int(Philox(key=seed % _SEEDS, counter=position).random_raw())
    # 52 bits: with 53 the largest number times a sum of 1 could round up to the sum itself.
    return (bits >> 12) * 2.0**-52


def probabilities(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities after temperature, zero outside the nucleus and not renormalised.

    The nucleus is that of transformers' ``TopPLogitsWarper``: from the least likely token up, those that together have
    at most ``1 - top_p`` are left out, and the most likely one never is.

    Args:
        logits: ``[N, V]``.
        temperature: ``[N]`` float64, positive.
        top_p: ``[N]`` float64.

    Returns:
        ``[N, V]`` float64.
    """
    logits = logits.double()
    # Less their maximum before the division: a tiny temperature must not overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    found = logits.softmax(dim=-1)
    cut = (top_p < 1).nonzero()[:, 0]  # the others skip the sort, whatever their neighbours ask for
    if len(cut):
        ordered, index = found[cut].sort(dim=-1, stable=True)
        left_out = ordered.cumsum(dim=-1) <= 1 - top_p[cut, None]
        left_out[:, -1] = False
        found[cut] = found[cut].masked_fill(left_out.scatter(1, index, left_out), 0)
    return found


def draw(logits: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """Draws one token for each row.

    Args:
        logits: ``[N, V]``, with a finite maximum in each row.
        sampling: How each row is sampled; temperatures are positive.
        positions: Absolute positions of the tokens to draw.

    Returns:
        ``[N]`` int64 token ids.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)

    found = probabilities(logits, column([s.temperature for s in sampling]), column([s.top_p for s in sampling]))
    chances = column([uniform(s.seed, position) for s, position in zip(sampling, positions, strict=True)])
    upto = found.cumsum(dim=-1)
    # The first token whose sum exceeds the target has a probability above zero.
    return torch.searchsorted(upto, (chances * upto[:, -1])[:, None], right=True)[:, 0]
