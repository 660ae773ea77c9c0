"""The way of what is read from the device to the host, through memory of a fixed size.

How much a step reads is not known when an engine measures what memory its model needs: so nothing here grows with the
step. What does not fit goes to the host in between, which waits for the device; steps that few tokens are read in, as
when answers are written, fit and go at once.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FLOATS = 2**20
"""Numbers of a piece: 64 requests with 512 numbers at each of 32 sites."""
_ROWS = 256
"""Tokens that are gathered in one go."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where some rows lie in the piece.

    Args:
        key: What they are.
        first: Where they begin.
        rows: How many there are.
        width: Numbers of each.
        dtype: What the numbers are, each of four bytes.
    """

    key: Hashable
    first: int
    rows: int
    width: int
    dtype: torch.dtype


class HostStore:
    """Rows of numbers by key, in the order in which they come, where the device is the host itself."""

    nbytes = 0

    def __init__(self) -> None:
        self._host: dict[Hashable, list[NDArray[Any]]] = {}

    def keep(self, key: Hashable, values: Tensor) -> None:
        """Keeps ``values [n, w]``, which others may overwrite."""
        self._host.setdefault(key, []).append(values.numpy().copy())

    def gather(self, key: Hashable, reported: Tensor, tokens: Tensor, columns: Tensor) -> None:
        """Keeps some columns of some rows; arguments as in :meth:`ReadStore.gather`."""
        self._host.setdefault(key, []).append(reported.numpy()[tokens.numpy()][:, columns.numpy()])

    def take(self) -> dict[Hashable, NDArray[Any]]:
        """Everything that was kept, ``[n, w]`` each, and begins anew."""
        found = {key: parts[0] if len(parts) == 1 else np.concatenate(parts) for key, parts in self._host.items()}
        self._host = {}
        return found

    def clear(self) -> None:
        """Forgets what a pass that failed half-way has left."""
        self._host.clear()


def store_for(device: torch.device, *, widest: int) -> "HostStore | ReadStore":
    """What keeps the readings of a step; ``widest`` is the most numbers of a row."""
    return HostStore() if device.type == "cpu" else ReadStore(widest=widest, device=device)


class ReadStore:
    """Rows of numbers by key, in the order in which they come, on the device until its piece of memory is full.

    Args:
        widest: Most numbers of a row.
        device: Where the piece is.
        floats: How many numbers it holds; more where a row is wider.
    """

    def __init__(self, *, widest: int, device: torch.device, floats: int = _FLOATS) -> None:
        self._piece = torch.zeros(max(floats, widest), device=device)
        self._whole_rows = torch.zeros(max(min(_ROWS * widest, floats), widest), device=device)
        self._used = 0
        self._kept: list[_Kept] = []
        self._host: dict[Hashable, list[NDArray[Any]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._piece.nbytes + self._whole_rows.nbytes

    def open(self, key: Hashable, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory ``[rows, width]`` for more of a key, to be filled before the next is opened; it must fit a piece."""
        size = rows * width
        if self._used + size > len(self._piece):
            self._flush()
        part = self._piece[self._used : self._used + size]
        self._kept.append(_Kept(key, self._used, rows, width, dtype))
        self._used += size
        return part.view(dtype).view(rows, width)

    def keep(self, key: Hashable, values: Tensor) -> None:
        """Keeps ``values [n, w]`` of four bytes each."""
        for part in torch.split(values, self._rows_of(values.shape[1])):
            self.open(key, part.shape[0], part.shape[1], part.dtype).copy_(part)

    def gather(self, key: Hashable, reported: Tensor, tokens: Tensor, columns: Tensor) -> None:
        """Keeps some columns of some rows.

        Args:
            key: What they are.
            reported: ``[T, K]`` float32.
            tokens: ``[n]`` int64, the rows.
            columns: ``[R]`` int64.
        """
        wide = reported.shape[1]
        for part in torch.split(tokens, self._rows_of(wide)):
            rows = self._whole_rows[: len(part) * wide].view(len(part), wide)
            torch.index_select(reported, 0, part, out=rows)
            torch.index_select(rows, 1, columns, out=self.open(key, len(part), len(columns)))

    def _rows_of(self, width: int) -> int:
        """How many rows of a width fit the memory that they go through."""
        return max(1, min(_ROWS, len(self._whole_rows) // max(width, 1)))

    def _flush(self) -> None:
        """Hands everything over to the host."""
        host = self._piece[: self._used].to("cpu", copy=True)
        for kept in self._kept:
            part = host[kept.first : kept.first + kept.rows * kept.width].view(kept.dtype)
            self._host.setdefault(kept.key, []).append(part.view(kept.rows, kept.width).numpy())
        self._kept, self._used = [], 0

    def take(self) -> dict[Hashable, NDArray[Any]]:
        """Everything that was kept, ``[n, w]`` each, and begins anew."""
        self._flush()
        found = {key: np.concatenate(parts) for key, parts in self._host.items()}
        self._host = {}
        return found

    def clear(self) -> None:
        """Forgets what a pass that failed half-way has left."""
        self._kept, self._used, self._host = [], 0, {}
