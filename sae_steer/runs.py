"""Running requests as rows of device tensors: where each is edited, and the sums of what was done to it.

A host whose steps are laid out on the device (vLLM) never asks on the CPU which token is whose. Row 0 of every table
belongs to nobody: what must not be counted is added there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.errors import RunFailed
from sae_steer.program import Program
from sae_steer.report import SiteTally, failure_of
from sae_steer.sites import Site
from sae_steer_kernels import EditBuffers, Flag

# Columns of a run's sums: two for the request, then for each site these five and four for each row.
TOUCHED, FAILED = range(2)
_HEAD = 2
_TOKENS, _LIMITED, _BROKEN, _DOSE_SUM, _DOSE_MAX = range(5)
_SITE_HEAD = 5
_MARKS = torch.tensor([int(Flag.TOUCHED), int(Flag.OVER_DOSE), int(Flag.NON_FINITE)], dtype=torch.int32)
_NEVER = torch.iinfo(torch.int64).max


def columns(program: Program, sites: Sequence[Site], rows: int) -> NDArray[np.int64]:
    """Which columns of a row of sums a program uses: its own sites and rows, in its own order.

    Args:
        program: The program.
        sites: The sites of the table, in its order.
        rows: ``K``, rows of the table's bucket.
    """
    width = _SITE_HEAD + 4 * rows
    found = [np.arange(_HEAD)]
    for part in program.sites:
        first = _HEAD + sites.index(part.site) * width
        found.append(first + np.arange(_SITE_HEAD))
        found += [first + _SITE_HEAD + i * rows + np.arange(len(part.rows)) for i in range(4)]
    return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Sums:
    """What was done to one request so far, as its columns say it.

    Args:
        program: The request's program.
        values: The values of :func:`columns`.
    """

    program: Program
    values: NDArray[np.float64]

    @property
    def touched(self) -> int:
        """Tokens that were touched at any site."""
        return int(self.values[TOUCHED])

    def tallies(self) -> list[SiteTally]:
        """One for each site of the program."""
        found: list[SiteTally] = []
        at = _HEAD
        for part in self.program.sites:
            rows = len(part.rows)
            head = self.values[at : at + _SITE_HEAD]
            held, fired, before, after = self.values[at + _SITE_HEAD : at + _SITE_HEAD + 4 * rows].reshape(4, rows)
            tally = SiteTally(part)
            tally.tokens, tally.limited = int(head[_TOKENS]), int(head[_LIMITED])
            tally.dose_sum, tally.dose_max = float(head[_DOSE_SUM]), float(head[_DOSE_MAX])
            tally.held, tally.fired = held.astype(np.int64), fired.astype(np.int64)
            tally.before, tally.after = before.copy(), after.copy()
            found.append(tally)
            at += _SITE_HEAD + 4 * rows
        return found

    @property
    def failure(self) -> RunFailed | None:
        """The error that the request must end with, if any."""
        at = _HEAD
        for part in self.program.sites:
            head = self.values[at : at + _SITE_HEAD]
            failure = failure_of(
                self.program,
                part.site,
                broken=bool(head[_BROKEN]),
                over=bool(head[_LIMITED]),
                dose=float(head[_DOSE_MAX]),
            )
            if failure is not None:
                return failure
            at += _SITE_HEAD + 4 * len(part.rows)
        if self.values[FAILED]:
            return RunFailed("A process of the host could not load what steers this request, and so it was ended.")
        return None


class RunTable:
    """The running requests of one bucket.

    Args:
        sites: Number of sites.
        rows: ``K``, rows of a slot of the bucket.
        device: Where the tensors live.
        capacity: Requests that fit before the tensors grow.
    """

    def __init__(self, sites: int, rows: int, device: torch.device, capacity: int = 16) -> None:
        self.sites, self.rows, self.device = sites, rows, device
        self._free: list[int] = []
        self._marks, self._zero = _MARKS.to(device), torch.zeros(1, 1, device=device)
        self._allocate(capacity + 1, pieces=4)

    def _allocate(self, size: int, pieces: int) -> None:
        """Tensors of ``size`` rows and ``pieces`` pieces, with what the smaller ones held."""
        old = getattr(self, "slot", torch.zeros(0)).shape[0]
        fresh = {
            "slot": torch.zeros(size, dtype=torch.int32),
            "fails": torch.zeros(size, dtype=torch.float64),  # 1 where passing the dose limit ends the request
            "seen": torch.full((size,), -1, dtype=torch.int64),
            "starts": torch.full((size, pieces), _NEVER, dtype=torch.int64),
            "masks": torch.zeros(size, pieces, dtype=torch.int32),
            "reads": torch.zeros(size, dtype=torch.int32),  # selectors on whose tokens something is read
            "sums": torch.zeros(size, _HEAD + self.sites * (_SITE_HEAD + 4 * self.rows), dtype=torch.float64),
        }
        for name, tensor in fresh.items():
            grown = tensor.to(self.device)
            if old:
                have = getattr(self, name)
                grown[tuple(slice(0, n) for n in have.shape)] = have
            setattr(self, name, grown)
        self.starts[0, 0] = 0  # a piece for nobody's tokens too, with nothing in it
        self._free += range(max(old, 1), size)

    slot: Tensor
    fails: Tensor
    seen: Tensor
    starts: Tensor
    masks: Tensor
    reads: Tensor
    sums: Tensor

    def add(self, program: Program, slot: int, prompt_length: int) -> int:
        """A row for a request that holds a slot."""
        pieces = program.pieces(prompt_length)
        size, wide = self.starts.shape
        if not self._free or len(pieces) > wide:
            self._allocate(size if self._free else 2 * size, max(wide, len(pieces)))
        row = self._free.pop()
        starts, masks = np.full(self.starts.shape[1], _NEVER), np.zeros(self.starts.shape[1], np.int32)
        starts[: len(pieces)], masks[: len(pieces)] = zip(*pieces, strict=True)
        self.starts[row], self.masks[row] = torch.from_numpy(starts), torch.from_numpy(masks)
        self.slot[row], self.fails[row] = slot, float(program.on_dose == "fail")
        self.reads[row] = program.reads
        self.seen[row], self.sums[row] = -1, 0.0
        return row

    def remove(self, row: int) -> None:
        """Gives a row back."""
        self.slot[row] = 0
        self._free.append(row)

    def count(
        self, sites: Tensor, row: Tensor, slots: Tensor, bits: Tensor, select: Tensor, buffers: EditBuffers
    ) -> Tensor:
        """Adds what a step did at some sites, ``n`` of them.

        Args:
            sites: ``[n]`` int64 numbers of the sites.
            row: ``[T]`` int64, the row of each token that counts; 0 for others.
            slots: ``[T]`` int32.
            bits: ``[T]`` int32.
            select: ``[n, S, K]`` int32: on which selectors each row of a slot holds.
            buffers: What the edits reported, ``[n, T, ...]`` each.

        Returns:
            ``[T]`` bool: the tokens that were touched.
        """
        marks = (buffers.flags[..., None] & self._marks) != 0
        f, g = buffers.before, buffers.after
        # An edit that does not hold leaves f' = f. Beyond the rows of a token's slot are values of other steps, in
        # columns that no report reads.
        held = (bits[:, None] & select.index_select(1, slots)) != 0
        told = buffers.dose.nan_to_num(0.0, 0.0).double()  # a token of length zero has no dose
        zero = self._zero.expand(*told.shape, 1)  # the largest dose is no sum
        parts = torch.cat([marks, told[..., None], zero, held, f != g, f * held, g * held], dim=2)
        cells = self.sums[:, _HEAD:].view(-1, self.sites, parts.shape[2])
        cells.index_put_((row[None], sites[:, None]), parts.double(), accumulate=True)
        largest = (_HEAD + _DOSE_MAX + sites * cells.shape[2])[:, None] + row * self.sums.shape[1]
        self.sums.view(-1).scatter_reduce_(0, largest.view(-1), told.view(-1), "amax")
        return marks[..., 0].any(dim=0)

    def count_touched(self, row: Tensor, touched: Tensor) -> None:
        """Ends a step: counts the touched tokens.

        Args:
            row: ``[T]`` int64, the row of each token that counts; 0 for others.
            touched: ``[T]`` bool, at any site.
        """
        self.sums[:, TOUCHED].index_add_(0, row, touched.double())

    def judge(self, rows: Tensor) -> None:
        """Marks, of some rows ``[N]``, those whose request must end with an error."""
        sites = self.sums[rows, _HEAD:].view(len(rows), self.sites, -1)
        over, broken = sites[:, :, _LIMITED].sum(dim=1), sites[:, :, _BROKEN].sum(dim=1)
        # One that failed before it ran stays so.
        self.sums[rows, FAILED] = (broken + over * self.fails[rows]).maximum(self.sums[rows, FAILED])
