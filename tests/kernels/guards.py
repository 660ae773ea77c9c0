"""Memory with poisoned bands around it, so that a kernel that reads or writes beside its tensors is found out.

The interpreter reads on past the end of a tensor without a word, as a GPU often does. What is read from a band is NaN,
or a huge integer, and spreads; what is written there is seen by :meth:`Guards.check`.
"""

import math

import torch
from torch import Tensor

BAND = 64  # elements before and after
POISON = {torch.uint8: 251, torch.int32: -(2**31) + 7, torch.int64: -(2**62) + 7, torch.bool: True}


def poison(t: Tensor) -> Tensor:
    """Fills a tensor with NaN, or with an integer that is no number of anything; returns it."""
    return t.fill_(math.nan if t.is_floating_point() else POISON[t.dtype])


class Guards:
    """Hands out guarded copies of tensors, and says whether their bands are as they were."""

    def __init__(self) -> None:
        self._memory: list[tuple[Tensor, Tensor, Tensor]] = []

    def copy(self, t: Tensor, *, gap: int = 0) -> Tensor:
        """A copy of ``t`` between two bands.

        Args:
            t: Any strided tensor of floats or integers.
            gap: Poisoned elements after each row (of the last dimension), which makes the copy non-contiguous.
        """
        width = t.shape[-1] if t.ndim else 1
        rows = t.numel() // width if width else 0
        memory = poison(torch.empty(2 * BAND + rows * (width + gap), dtype=t.dtype, device=t.device))
        inner = memory[BAND : BAND + rows * (width + gap)].view(rows, width + gap)[:, :width]
        place = inner.unflatten(0, t.shape[:-1]) if t.ndim > 1 else inner.view(t.shape)
        place.copy_(t)
        mine = torch.zeros(memory.shape, dtype=torch.bool, device=t.device)
        mine[BAND : BAND + rows * (width + gap)].view(rows, width + gap)[:, :width] = True
        self._memory.append((memory, mine, memory.clone()))
        return place

    def maybe(self, t: Tensor | None) -> Tensor | None:
        """A copy of ``t`` where there is one."""
        return None if t is None else self.copy(t)

    def check(self) -> None:
        """Fails where anything but the tensors themselves was written."""
        for memory, mine, before in self._memory:
            same = memory == before
            if memory.is_floating_point():
                same |= memory.isnan() & before.isnan()
            assert bool((same | mine).all()), f"written beside a tensor of {tuple(memory.shape)} {memory.dtype}"
