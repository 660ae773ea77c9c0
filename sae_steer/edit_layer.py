"""The edit at one site: reads the tables and the step's map, calls the ops. Hosts put it into the model."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sae_steer.errors import Unsupported
from sae_steer.readout import Readout
from sae_steer.sites import Site
from sae_steer.tables import SiteTables
from sae_steer_kernels import (
    DropScratch,
    EditBuffers,
    EditTable,
    RankBuffers,
    SmallEdits,
    TokenGroups,
    feature_edit,
    reconstruct,
    small_edits,
    topk_rank,
)


class TokenMap(Protocol):
    """What a layer must know of a step: which slot each token has, and which of its selectors hold."""

    @property
    def capacity(self) -> int:
        """Tokens that the buffers hold."""
        ...

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """For each bucket ``[capacity]`` int32; 0 = none."""
        ...

    @property
    def bits(self) -> Tensor:
        """``[capacity]`` int32."""
        ...

    @property
    def groups(self) -> tuple[TokenGroups, ...]:
        """For each bucket, the step's tokens grouped by slot; empty = they are not."""
        ...


class EditLayer:
    """Edits a site's tensor in place.

    Args:
        tables: The site's tables.
        step: The token -> slot map that all sites share.
        reports: Whether the layer has buffers of its own to report to; without them, each call says where.
    """

    def __init__(self, tables: SiteTables, step: TokenMap, *, reports: bool = True) -> None:
        self.tables = tables
        self.step = step
        self._reports = reports
        # One flag a bucket, on the CPU: the op reads it without a device synchronisation, and a compiled graph does not
        # bake it in. ``enabled`` is their disjunction, for eager code, where an idle site costs one attribute look-up.
        self.active = tuple(torch.zeros((), dtype=torch.bool) for _ in tables.tables)
        self.enabled = False
        self._buckets: frozenset[int] = frozenset()
        self.readouts: tuple[Readout, ...] = ()
        """What is read of whole dictionaries in the next step."""
        self._allocate(step.capacity)

    @property
    def site(self) -> Site:
        """Where the layer is."""
        return self.tables.site

    def _allocate(self, tokens: int) -> None:
        device = self.tables.device
        self.capacity = tokens
        self._small: dict[tuple[int, int], tuple[Tensor, Tensor, EditBuffers, SmallEdits | None]] = {}
        self.buffers = tuple(
            EditBuffers.empty(tokens=tokens, rows=table.enc.shape[1], device=device)
            for table in (self.tables.tables if self._reports else ())
        )
        wholes = self.tables.wholes
        self._base = torch.zeros(tokens, self.tables.width_out, device=device) if wholes else None
        self._ranks = tuple(
            RankBuffers.empty(tokens=tokens, rows=table.enc.shape[1], device=device)
            if any(whole.topk for whole in wholes)
            else None
            for table in self.tables.tables
        )
        # On a CPU the few active features of a TopK dictionary are found without it.
        self._drops = tuple(
            DropScratch.empty(tokens=tokens, features=whole.enc.shape[0], topk=whole.topk, device=device)
            if whole.topk and device.type != "cpu"
            else None
            for whole in wholes
        )

    @property
    def armed(self) -> bool:
        """Whether the ops must be called: a program is at work here, or a graph that must hold them is compiled."""
        # In this order: a compiled graph must not depend on ``enabled``.
        return torch.compiler.is_compiling() or self.enabled

    def arm(self, buckets: frozenset[int], readouts: Sequence[Readout] = ()) -> None:
        """Says which buckets have a program at this site in the next step; grows the buffers with the step's map."""
        self.enabled, self._buckets, self.readouts = bool(buckets), buckets, tuple(readouts)
        for number, flag in enumerate(self.active):
            flag.fill_(number in buckets)
        if self.capacity < self.step.capacity:
            self._allocate(self.step.capacity)
        for buffers in self.buffers:
            # A pass that never reaches the site must not be counted by what the pass before it left here.
            buffers.flags.zero_()

    def __call__(
        self,
        y: Tensor,
        read: Tensor | None = None,
        residual: Tensor | None = None,
        reports: Sequence[EditBuffers] | None = None,
    ) -> None:
        """Edits ``y [..., D_out]`` in place, rows in the order of the step's map.

        Args:
            y: The tensor that is written.
            read: ``[..., D]`` what is encoded, where it is not ``y``.
            residual: ``[..., D]`` added to what is encoded.
            reports: For each bucket, where its edits report; None = the layer's own buffers.
        """
        if not self.armed:
            return
        reports = self.buffers if reports is None else reports
        if y.is_contiguous():
            self._edit(y.view(-1, y.shape[-1]), _flat(read), _flat(residual), reports)
        else:
            flat = y.reshape(-1, y.shape[-1])  # a copy, perhaps
            self._edit(flat, _flat(read), _flat(residual), reports)
            y.copy_(flat.view(y.shape))

    def _edit(self, y: Tensor, read: Tensor | None, residual: Tensor | None, reports: Sequence[EditBuffers]) -> None:
        for readout in self.readouts:  # of what no edit of this site has touched
            readout.take(y if read is None else read, residual)
        tracing = torch.compiler.is_compiling()  # a graph holds every bucket, whichever is armed
        for number, table in enumerate(self.tables.tables):
            if not (tracing or number in self._buckets):
                continue
            rank = self._whole_dictionaries(number, table, y, read, residual, tracing=tracing)
            small = None if tracing else self._small_edits(number, reports[number])
            if small is not None and small.takes(y):
                small(y, read, residual, self._base, rank)
                continue
            tokens = y.shape[0]
            feature_edit(
                y, self.step.slots[number][:tokens], self.step.bits[:tokens], self.active[number], table,
                reports[number].first(tokens), read=read, residual=residual,
                base=self._base[:tokens] if self._base is not None else None, rank=rank,
                groups=self.step.groups[number] if self.step.groups else None,
            )  # fmt: skip

    def _whole_dictionaries(
        self, bucket: int, table: EditTable, y: Tensor, read: Tensor | None, residual: Tensor | None, *, tracing: bool
    ) -> Tensor | None:
        """Fills ``base``, where rows drop the reconstruction error; the ranks of rows that are TopK."""
        tokens = y.shape[0]
        all_ranks = self._ranks[bucket]
        ranks = all_ranks.first(tokens) if all_ranks is not None else None
        for whole, drop in zip(self.tables.wholes, self._drops, strict=True):
            drops = tracing or self.tables.drops(bucket, whole)
            if not (drops or whole.topk):
                continue
            slots, active = self.step.slots[bucket][:tokens], self.active[bucket]
            scalars = whole.row_float, whole.row_int
            if whole.topk:
                assert ranks is not None  # allocated where there is such a dictionary
                topk_rank(
                    y, slots, active, table, whole.number, whole.enc, *scalars, ranks, read=read, residual=residual
                )
            if drops:
                assert self._base is not None  # allocated together with the wholes
                reconstruct(
                    y, slots, self.step.bits[:tokens], active, table.slot_int, whole.number,
                    whole.enc, whole.dec, whole.dec_bias, *scalars, self._base[:tokens],
                    scratch=drop.first(tokens) if drop is not None else None, read=read, residual=residual,
                )  # fmt: skip
        return ranks.rank if ranks is not None else None

    def _small_edits(self, bucket: int, reports: EditBuffers) -> SmallEdits | None:
        """What edits steps of few tokens, as long as the map and the reports are where they were."""
        slots, bits = self.step.slots[bucket], self.step.bits
        known = self._small.get((bucket, id(reports)))
        if known is None or known[0] is not slots or known[1] is not bits:
            # The reports are held too, so that no others come to have their number.
            known = slots, bits, reports, small_edits(self.tables.tables[bucket], slots, bits, reports)
            self._small[bucket, id(reports)] = known
        return known[3]


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def refuse_gradients(y: Tensor) -> None:
    """Raises :class:`Unsupported` where an edit in place would break a backward pass."""
    if torch.is_grad_enabled() and y.requires_grad:
        raise Unsupported(
            "Steering edits activations in place and has no gradient. Run the model under torch.no_grad()."
        )
