"""Slot tables, the step's map and edit layers, hooked into one transformers model: what a host drives."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sae_steer.catalog import Catalog
from sae_steer.edit_layer import EditLayer
from sae_steer.families import width
from sae_steer.hooks import install
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.readings import TextOf
from sae_steer.report import Run
from sae_steer.sites import Site
from sae_steer.slots import Bucket, Slot, SlotPool, buckets_of
from sae_steer.step import Span, StepMap
from sae_steer.step_reads import StepReads
from sae_steer.tables import SiteTables
from sae_steer_kernels import traced, warm_up


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What one forward pass held.

    Args:
        tokens: Tokens that at least one edit may have touched.
        edits: (token, feature) pairs that changed.
        programs: Different programs in this forward pass.
    """

    tokens: int = 0
    edits: int = 0
    programs: int = 0


class Runtime:
    """Steers one model. Use :meth:`attach`.

    Slots may be acquired and released from any thread; :meth:`begin_step` and :meth:`end_step` belong to the thread
    that runs the model.
    """

    def __init__(self, model: PreTrainedModel, catalog: Catalog, limits: Limits, sites: Sequence[Site]) -> None:
        self.catalog = catalog
        self.limits = limits
        self.sites = tuple(sites)
        buckets = buckets_of(limits)
        self._device = model.device
        self._pool = SlotPool(buckets)
        self._lock = threading.Lock()
        self._step = StepMap(len(buckets), model.device)
        self._layers = {site: EditLayer(self._tables(model, site, buckets), self._step) for site in self.sites}
        self._handles: list[RemovableHandle] = []
        self._reads = StepReads(())
        warm_up(model.device, model.dtype)

    @classmethod
    def attach(cls, model: PreTrainedModel, catalog: Catalog, *, limits: Limits, sites: Sequence[Site] = ()) -> Self:
        """Allocates the tables and hooks the sites of the catalog's SAEs, and ``sites`` beside them.

        Raises:
            WidthMismatch: An SAE or a vector does not fit the model.
            SiteError: The model has no such place.
            CheckpointError: An SAE that is held whole cannot be read.
        """
        runtime = cls(model, catalog, limits, catalog.sites(sites))
        try:
            for layer in runtime._layers.values():
                runtime._handles.extend(install(model, layer))
        except BaseException:
            runtime.detach()
            raise
        return runtime

    def _tables(self, model: PreTrainedModel, site: Site, buckets: Sequence[Bucket]) -> SiteTables:
        reads, writes = width(model, site.read), width(model, site.write)
        return SiteTables.fit(
            site,
            self.catalog,
            buckets=buckets,
            width=reads,
            width_out=writes,
            dtype=model.dtype,
            device=model.device,
        )

    def detach(self) -> None:
        """Takes the hooks out of the model; the model is then as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the tables of all sites."""
        return sum(layer.tables.nbytes for layer in self._layers.values())

    @property
    def slots_in_use(self) -> int:
        """Slots that a request holds."""
        return self._pool.in_use

    def acquire(self, program: Program) -> Slot | None:
        """Takes a slot for a program and loads it, or shares the one that an equal program has.

        Returns:
            The slot; None where all are held: the request must wait, and never run unsteered.

        Raises:
            CheckpointError: A row cannot be read. The slot is given back.
        """
        with self._lock:
            found = self._pool.acquire(program.digest, program.rows)
            if found is None:
                return None
            slot, fresh = found
            if fresh:
                try:
                    self._load(program, slot)
                except BaseException:
                    self._pool.forget(program.digest)
                    raise
            return slot

    def _load(self, program: Program, slot: Slot) -> None:
        parts = {part.site: part for part in program.sites}
        for site, layer in self._layers.items():
            if site in parts:
                layer.tables.write(slot.bucket, slot.index, parts[site], program)
            else:
                layer.tables.clear(slot.bucket, slot.index)
        # The forward pass may run on a stream of its own, which must not read the tables before they are written.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def release(self, program: Program) -> None:
        """Gives back one hold on a program's slot."""
        with self._lock:
            self._pool.release(program.digest)

    def start_run(self, program: Program, slot: Slot, prompt_length: int) -> Run:
        """A run of a program that holds a slot, for a request of ``prompt_length`` prompt tokens."""
        return Run(program, slot, prompt_length)

    def report(self, run: Run) -> dict[str, Any]:
        """The ``applied`` block of a run."""
        return run.report(self.catalog.name_of)

    def new_readings(self, run: Run, text_of: TextOf | None = None) -> list[dict[str, Any]] | None:
        """For each reading of a run, the tokens that were not told yet; None where none is told token by token."""
        return run.reader.new(self.catalog.name_of, text_of) if run.reader is not None else None

    def readings(self, run: Run, text_of: TextOf | None = None) -> dict[str, Any]:
        """The ``readings``, ``triggers`` and ``trigger`` of a run that has ended; empty where it asked for none."""
        return run.reader.finish(self.catalog.name_of, text_of) if run.reader is not None else {}

    @traced("sae_steer::begin_step")
    def begin_step(self, spans: Sequence[Span]) -> None:
        """Lays out the next forward pass: ``spans`` in the order of its flattened tokens."""
        self._step.fill(spans)
        armed: dict[Site, set[int]] = {site: set() for site in self.sites}
        for placed in self._step.placed:
            for part in placed.run.program.sites:
                armed[part.site].add(placed.run.slot.bucket)
        self._reads = StepReads(self._step.placed)
        for site, layer in self._layers.items():
            layer.arm(frozenset(armed[site]), self._reads.readouts(layer.tables))

    @traced("sae_steer::end_step")
    def end_step(self) -> StepSummary:
        """Gathers what the forward pass did into its runs, and lays out an idle step."""
        placed = self._step.placed
        if not placed:
            return StepSummary()
        touched = np.zeros(self._step.capacity, dtype=np.bool_)
        edits = 0
        reads = self._reads
        for site, layer in self._layers.items():
            if not layer.enabled:
                continue
            for number, buffers in enumerate(layer.buffers):
                here = [p for p in placed if p.run.slot.bucket == number and p.run.tally(site) is not None]
                if not here:
                    continue
                end = max(p.first + p.positions.size for p in here)
                view = buffers.first(end)
                before, after, dose, flags = (t.cpu().numpy() for t in (view.before, view.after, view.dose, view.flags))
                for p in here:
                    cut = slice(p.first, p.first + p.positions.size)
                    tally = p.run.tally(site)
                    assert tally is not None  # filtered above
                    edits += tally.add(p.positions, p.bits, before[cut], after[cut], dose[cut], flags[cut])
                    p.run.judge(site, flags[cut], dose[cut])
                    touched[cut] |= flags[cut] != 0
                    reads.gather(p, site, before[cut], after[cut])
        reads.finish()
        for p in placed:
            p.run.touch(p.positions, touched[p.first : p.first + p.positions.size])
        programs = len({p.run.program.digest for p in placed})
        summary = StepSummary(int(touched.sum()), edits, programs)
        self.drop_step()
        return summary

    def drop_step(self) -> None:
        """Lays out an idle step, and forgets the one before without gathering it: its forward pass broke off."""
        self._step.clear()
        self._reads = StepReads(())
        for layer in self._layers.values():
            layer.arm(frozenset())
