"""The largest features of the tokens that ask for them, at one site and for one dictionary that is held whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.tables import Whole
from sae_steer_kernels import ReadoutBuffers, topk_readout
from sae_steer_kernels.topk_readout.layout import GROUP

_ROWS = 256
"""Tokens that are read in one go: what the op keeps between its launches grows with them."""
_ALIGNED = 16
"""Elements: kernels are compiled for addresses that are multiples of 16 bytes."""
_ACTIVE = torch.ones((), dtype=torch.bool)
_KNOWN = 256
"""Sizes whose buffers are not cut anew."""


def _groups(features: int) -> int:
    return -(-features // GROUP)


def _floats(features: int, k: int) -> int:
    """Floats that the op needs for a token: the result, moments, groups and candidates."""
    return k + 3 + 2 * _groups(features) + GROUP * k


def _ints(k: int) -> int:
    """Integers that it needs: the result, the groups that are chosen, and a place in the list of tokens."""
    return 2 * k + 2


class ReadoutSpace:
    """Memory of a fixed size that all readouts share, one after another: what they need beside their result.

    Args:
        shapes: ``F`` and ``D`` of each dictionary.
        usual_k: So many largest features are read of :data:`_ROWS` tokens in one go.
        most_k: So many can be read at all, of fewer tokens in one go.
        device: Where the memory is.
        tokens: How many are read in one go at most.
        element: Most bytes of a number of ``x``.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        usual_k: int,
        most_k: int,
        device: torch.device,
        tokens: int = _ROWS,
        element: int = 4,
    ) -> None:
        self._most = tokens
        self._floats = max(
            max(tokens * _floats(features, min(usual_k, features)), _floats(features, min(most_k, features)))
            for features, _ in shapes
        )
        self._whole = max(tokens * _ints(usual_k), _ints(most_k))
        groups, width = max(_groups(features) for features, _ in shapes), max(width for _, width in shapes)
        self._numbers = torch.empty(self._floats + 4 * _ALIGNED, device=device)
        self._ints = torch.empty(self._whole + 4 * _ALIGNED, dtype=torch.int32, device=device)
        self._places = torch.empty(tokens * groups, dtype=torch.uint8, device=device)
        self._tokens = torch.empty(2, tokens * width * element, dtype=torch.uint8, device=device)
        self.wanted = torch.ones(tokens, dtype=torch.int32, device=device)
        self._buffers: dict[tuple[int, int, int], ReadoutBuffers] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(t.nbytes for t in (self._numbers, self._ints, self._places, self._tokens, self.wanted))

    def rows(self, features: int, k: int) -> int:
        """How many tokens can be read in one go."""
        return max(1, min(self._most, self._floats // _floats(features, k), self._whole // _ints(k)))

    def buffers(self, tokens: int, features: int, k: int) -> ReadoutBuffers:
        """The op's buffers for at most :meth:`rows` tokens, with what another readout has left in them."""
        known = self._buffers.get((tokens, features, k))
        if known is None:
            if len(self._buffers) >= _KNOWN:  # requests choose k
                self._buffers.clear()
            known = self._buffers[tokens, features, k] = self._cut_buffers(tokens, features, k)
        return known

    def _cut_buffers(self, tokens: int, features: int, k: int) -> ReadoutBuffers:
        groups = _groups(features)
        values, moments, pairs, candidates = _cut(
            self._numbers, (tokens, k), (tokens, 3), (tokens, groups, 2), (tokens, k, GROUP)
        )
        ids, chosen, todo = _cut(self._ints, (tokens, k), (tokens, k + 1), (tokens + 1,))
        [places] = _cut(self._places, (tokens, groups))
        return ReadoutBuffers(ids, values, moments, pairs, places, chosen, candidates, todo)

    def of_tokens(self, x: Tensor, residual: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some rows ``[n]`` of ``x [T, D]``, and of the residual."""
        own, more = self._tokens
        first = torch.index_select(x, 0, rows, out=_like(own, x, len(rows)))
        if residual is None:
            return first, None
        return first, torch.index_select(residual, 0, rows, out=_like(more, residual, len(rows)))


def _like(memory: Tensor, x: Tensor, rows: int) -> Tensor:
    """So many rows as ``x [T, D]`` has them, in some bytes."""
    return memory[: rows * x.shape[1] * x.element_size()].view(x.dtype).view(rows, x.shape[1])


def _cut(flat: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Pieces of these shapes, one behind the other."""
    found: list[Tensor] = []
    first = 0
    for shape in shapes:
        size = int(np.prod(shape))
        found.append(flat[first : first + size].view(shape))
        first += -(-size // _ALIGNED) * _ALIGNED
    return found


@dataclass(slots=True)
class Readout:
    """What a forward pass must read of a whole dictionary. Made for one pass.

    Args:
        whole: The dictionary.
        k: How many of the largest features.
        tokens: ``[n]`` int64, the rows of the pass that ask.
        space: What it works in; None = memory of its own.
        keep: Gets ``ids [m, k]`` int32 (-1 = none) and ``values [m, k]``, some tokens after the other, in memory that
            the next ones overwrite; None = they are kept for :meth:`found`.
    """

    whole: Whole
    k: int
    tokens: Tensor
    space: ReadoutSpace | None = None
    keep: Callable[[Tensor, Tensor], None] | None = None
    _found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, x: Tensor, residual: Tensor | None) -> None:
        """Reads ``x [T, D]``, with ``residual [T, D]`` added."""
        _outside_graphs(self, x, residual)

    def clear(self) -> None:
        """Begins anew."""
        self._found.clear()

    def put(self, ids: Tensor, values: Tensor) -> None:
        """Takes over what was found for the next tokens."""
        if self.keep is not None:
            self.keep(ids, values)
        else:
            self._found.append((ids.clone(), values.clone()))

    def found(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """``ids [n, k]`` (-1 = none) and ``values [n, k]``; without any where the pass did not come here.

        The values of a token whose residual is not finite are NaN.
        """
        if not self._found:
            shape = len(self.tokens), self.k
            return np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        ids, values = (torch.cat(parts).cpu().numpy() for parts in zip(*self._found, strict=True))
        return ids, values


def _read(readout: Readout, x: Tensor, residual: Tensor | None) -> None:
    whole, tokens = readout.whole, readout.tokens
    features, width = whole.enc.shape
    space = readout.space
    if space is None:
        space = ReadoutSpace(
            [(features, width)], usual_k=readout.k, most_k=readout.k, device=tokens.device,
            tokens=min(len(tokens), _ROWS), element=x.element_size(),
        )  # fmt: skip
    readout.clear()
    for part in torch.split(tokens, space.rows(features, readout.k)):
        buffers = space.buffers(len(part), features, readout.k)
        own, more = space.of_tokens(x, residual, part)
        topk_readout(
            own, space.wanted[: len(part)], _ACTIVE, whole.enc, whole.row_float,
            whole.row_int, buffers, residual=more,
        )  # fmt: skip
        # No feature of a token that is not finite is larger than another, and yet it must not pass for one without any.
        finite = (own if more is None else own.float() + more.float()).isfinite().all(dim=1)
        buffers.values.masked_fill_(~finite[:, None], torch.nan)
        readout.put(buffers.ids, buffers.values)


_outside_graphs: Any = torch.compiler.disable(torch.no_grad()(_read))  # type: ignore[no-untyped-call]
"""Each pass has other tokens, which a compiled model's graph must not hold."""
