"""The tokens of one step that are read, on the device: which they are, and what every site reports of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sae_steer.read_store import HostStore, ReadStore
from sae_steer_kernels import EditBuffers, StepTokens

Gathers = Mapping[tuple[int, int, bool], Tensor]
"""By bucket, number of the site, and whether after the edits: rows of a slot that any request reads, ``[R]`` int64."""


@dataclass(slots=True)
class DeviceReads:
    """What one step reads.

    Args:
        gathers: What is kept.
        tokens: ``[n]`` int64, the rows of the step that are read.
        request: ``[n]`` int64, whose they are: numbers of the batch's requests.
        positions: ``[n]`` int64, absolute.
        ids: ``[n]`` int64 token ids.
        bits: ``[n]`` int32 selectors.
        store: Where the activations go, ``[n, R]``, under the keys of ``gathers``.
    """

    gathers: Gathers
    tokens: Tensor
    request: Tensor
    positions: Tensor
    ids: Tensor
    bits: Tensor
    store: HostStore | ReadStore

    @classmethod
    def of(cls, gathers: Gathers, step: StepTokens, store: HostStore | ReadStore) -> Self | None:
        """Of a step that is laid out; None where no token of it is read.

        It waits for the device, which only steps with readers pay.
        """
        assert step.wanted is not None  # who gathers asks for it
        kept = (step.request, step.absolute, step.known, step.bits)
        if step.wanted.device.type == "cpu":
            # A decode step's few tokens: numpy's calls are shorter than the way to torch's.
            found = np.flatnonzero(step.wanted.numpy())
            tokens, parts = torch.from_numpy(found), [torch.from_numpy(each.numpy()[found]) for each in kept]
        else:
            tokens = step.wanted.nonzero().squeeze(1)
            parts = [each[tokens] for each in kept]
        request, positions, ids, bits = parts
        return cls(gathers, tokens, request, positions, ids, bits, store) if len(tokens) else None

    def gather(self, site: int, reports: Sequence[EditBuffers]) -> None:
        """Keeps what a site has reported, before another site reports to the same place."""
        for key, rows in self.gathers.items():
            bucket, number, after = key
            if number == site:
                own = reports[bucket]
                self.store.gather(key, own.after if after else own.before, self.tokens, rows)
