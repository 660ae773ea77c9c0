"""Counts of positive numbers in very many cells at once, in bounded memory: a sparse histogram on the floats' own grid.

A positive float32 without its last ``23 - m`` mantissa bits is the number of its bin: bins of relative width ``2^-m``
or less over the whole range of float32, with no range to choose beforehand. Only bins that hold something are kept,
sorted, as one 64-bit key each. Where there would be more of them than the limit, two neighbours become one everywhere
(the key loses its last bit) and ``m`` falls by one. The idea of a log-spaced histogram that collapses is DDSketch's
(Masson, Rim and Lee, 2019) and HdrHistogram's.
"""

import numpy as np
from numpy.typing import NDArray

from sae_steer.errors import DataError

PRECISION = 8
"""``m`` at the start: a number is known to 0.4 %."""
LEAST_PRECISION = 6
"""``m`` at the end: a fine bin is never wider than one of 64 equal bins up to the same number."""
_EXPONENT_BITS = 8
_MANTISSA_BITS = 23


class Sketch:
    """A histogram for each of many cells, all in two arrays.

    Args:
        limit: Most bins held over all cells; 16 bytes each.
        precision: ``m``.
    """

    def __init__(self, limit: int = 2**24, precision: int = PRECISION) -> None:
        self.limit, self.precision = limit, precision
        self.keys: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    @property
    def codes(self) -> int:
        """Bins that a cell may have."""
        return 1 << (_EXPONENT_BITS + self.precision)

    @property
    def error(self) -> float:
        """Most that a number differs from its bin's edges, as a share of it."""
        return 2.0**-self.precision

    def add(self, cells: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Counts positive, finite ``values [n]`` in their ``cells [n]``."""
        codes = values.view(np.int32) >> (_MANTISSA_BITS - self.precision)
        keys = cells * self.codes + codes
        keys.sort()
        self._merge(*_runs(keys, np.ones(keys.size, dtype=np.int64)))

    def merge(self, keys: NDArray[np.int64], counts: NDArray[np.int64], precision: int) -> None:
        """Adds the bins of another sketch.

        Raises:
            DataError: There are more cells than the limit allows even with the coarsest bins.
        """
        while self.precision > precision:
            self._coarsen()
        self._merge(*_runs(keys >> (precision - self.precision), counts))

    def _merge(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        if self.keys.size:
            keys, counts = np.concatenate([self.keys, keys]), np.concatenate([self.counts, counts])
            order = np.argsort(keys, kind="stable")
            keys, counts = _runs(keys[order], counts[order])
        self.keys, self.counts = keys, counts
        while self.keys.size > self.limit:
            self._coarsen()

    def _coarsen(self) -> None:
        if self.precision == LEAST_PRECISION:
            raise DataError(
                f"Activations of so many features and labels need more than {self.limit} bins. Calibrate with fewer "
                "labels: rename those that are not asked for to one, with --label-name VALUE=rest."
            )
        self.precision -= 1
        self.keys, self.counts = _runs(self.keys >> 1, self.counts)

    def of(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The bins of cells ``first`` to ``last - 1``: their cells, codes and counts, sorted by cell and code."""
        part = slice(*np.searchsorted(self.keys, [first * self.codes, last * self.codes]))
        cells, codes = np.divmod(self.keys[part], self.codes)
        return cells, codes, self.counts[part]

    def edges(self, codes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where bins start and end."""
        shift = _MANTISSA_BITS - self.precision
        low = (codes << shift).astype(np.int32).view(np.float32).astype(np.float64)
        high = (np.minimum((codes + 1) << shift, 0x7F7FFFFF)).astype(np.int32).view(np.float32).astype(np.float64)
        return low, high


def _runs(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted keys, each once, with the sums of their counts."""
    if keys.size == 0:
        return keys, counts
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)
