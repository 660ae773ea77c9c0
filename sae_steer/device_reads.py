"""The tokens of one step that are read, on the device: which they are, and what every site reports of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from sae_steer.read_store import HostStore, ReadStore
from sae_steer_kernels import EditBuffers

Gathers = Mapping[tuple[int, int], Tensor]
"""By bucket and number of the site, which rows of a slot are read by any request ``[R]`` int64, on the device."""


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
        store: Where f ``[n, R]`` goes, under ``("f", bucket, site)``, and f' under ``("f'", bucket, site)``.
    """

    gathers: Gathers
    tokens: Tensor
    request: Tensor
    positions: Tensor
    ids: Tensor
    bits: Tensor
    store: HostStore | ReadStore

    @classmethod
    def of(
        cls,
        gathers: Gathers,
        wanted: Tensor,
        request: Tensor,
        positions: Tensor,
        ids: Tensor,
        bits: Tensor,
        store: HostStore | ReadStore,
    ) -> Self | None:
        """From ``wanted [T]`` bool and what a step knows of its tokens, ``[T]`` each; None where none is wanted.

        It waits for the device, which only steps with readers pay.
        """
        tokens = wanted.nonzero().squeeze(1)
        if not len(tokens):
            return None
        return cls(gathers, tokens, request[tokens], positions[tokens], ids[tokens], bits[tokens], store)

    def gather(self, site: int, reports: Sequence[EditBuffers]) -> None:
        """Keeps what a site has reported, before another site reports to the same place."""
        for (bucket, number), rows in self.gathers.items():
            if number == site:
                own = reports[bucket]
                self.store.gather(("f", bucket, site), own.before, self.tokens, rows)
                self.store.gather(("f'", bucket, site), own.after, self.tokens, rows)
