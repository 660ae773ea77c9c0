"""The largest features of the tokens that ask for them, at one site and for one dictionary that is held whole."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae_steer.tables import Whole
from sae_steer_kernels import ReadoutBuffers, topk_readout

_ROWS = 256
"""Tokens that are read in one go: what the op keeps between its launches grows with them."""


@dataclass(slots=True)
class Readout:
    """What a forward pass must read of a whole dictionary. Made for one pass.

    Args:
        whole: The dictionary.
        k: How many of the largest features.
        tokens: ``[n]`` int64, the rows of the pass that ask.
    """

    whole: Whole
    k: int
    tokens: Tensor
    ids: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, device = len(self.tokens), self.tokens.device
        self.ids = torch.full((n, self.k), -1, dtype=torch.int32, device=device)
        self.values = torch.zeros(n, self.k, device=device)

    def take(self, x: Tensor, residual: Tensor | None) -> None:
        """Reads ``x [T, D]``, with ``residual [T, D]`` added, into ``ids [n, k]`` (-1 = none) and ``values [n, k]``."""
        for first in range(0, len(self.tokens), _ROWS):
            _outside_graphs(self, slice(first, first + _ROWS), x, residual)


def _read(readout: Readout, part: slice, x: Tensor, residual: Tensor | None) -> None:
    """Reads some of the tokens."""
    whole, rows = readout.whole, readout.tokens[part]
    wanted = torch.ones(len(rows), dtype=torch.int32, device=rows.device)
    buffers = ReadoutBuffers.empty(tokens=len(rows), features=whole.enc.shape[0], k=readout.k, device=rows.device)
    topk_readout(
        x[rows], wanted, torch.ones((), dtype=torch.bool), whole.enc, whole.row_float, whole.row_int, buffers,
        residual=residual[rows] if residual is not None else None,
    )  # fmt: skip
    readout.ids[part], readout.values[part] = buffers.ids, buffers.values


_outside_graphs: Any = torch.compiler.disable(_read)  # type: ignore[no-untyped-call]
"""Each pass has other tokens, which a compiled model's graph must not hold."""
