"""Keeps what is not finite in one request from the others of its batch.

The batch's attention is dense: a neighbour's keys and values are masked, and 0 x NaN is NaN. So each token's keys and
values are checked on their way into the cache; where they are not finite they become 0, for the neighbours' sake, and
the request they belong to must end. Finite rows are unchanged to the bit.
"""

import torch
from torch import Tensor


class FiniteRows:
    """Which tokens of a forward pass had keys and values that were finite in every layer."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def clean(self, x: Tensor) -> Tensor:
        """The keys or values of a layer, ``[1, H, T, E]``, with 0 for what is not finite."""
        finite = x.isfinite()
        bad = ~finite.all(dim=-1).all(dim=1)[0]
        self._bad = bad if self._bad is None else self._bad | bad
        return torch.where(finite, x, 0)

    def take(self) -> list[int]:
        """Numbers of the tokens that were not finite, of the forward pass that has ended."""
        bad, self._bad = self._bad, None
        return [] if bad is None else [int(token) for token in bad.nonzero()[:, 0].tolist()]
