"""The plugin beside the model: tables, hooks, and the step's map; one of these in every worker."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae_steer.catalog import Catalog
from sae_steer.device_step import BatchRows, DeviceStep
from sae_steer.edit_layer import EditLayer
from sae_steer.errors import NonFinite, RunFailed, SiteError, SteerError
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.readings import NOT_FINITE
from sae_steer.runs import FAILED, TOUCHED, columns
from sae_steer.sites import Kind, Place, Site
from sae_steer.slots import Slot, buckets_of
from sae_steer.tables import SiteTables
from sae_steer.wire import parse
from sae_steer_kernels import traced, warm_up
from sae_steer_vllm.channel import PROGRAM, SLOT, Snapshot
from sae_steer_vllm.harvest import Harvest
from sae_steer_vllm.hooks import install
from sae_steer_vllm.worker_reads import ReadPlan, StepReads, read_runs, readout_space

_NONE: frozenset[int] = frozenset()

logger = logging.getLogger("vllm.sae_steer")  # vLLM's own handlers print what is below "vllm"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the plugin must know of a running model.

    Args:
        hidden: Width of the residual stream.
        heads: Width of ``z``.
        vocabulary: Token ids are below this number.
        dtype: Its element type.
        device: Where it runs.
        max_tokens: Most tokens of a step, padding and all.
        ranks: Processes that share each layer.
    """

    hidden: int
    heads: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    max_tokens: int
    ranks: int = 1

    def width(self, place: Place) -> int:
        """Width of the tensor at a place."""
        return self.heads if place.kind is Kind.Z else self.hidden


@dataclass(slots=True)
class Editor:
    """One site, as the op finds it while the model runs.

    Args:
        number: Its number among the sites.
        layer: Its tables and the edit.
        step: The step's map and sums.
    """

    number: int
    layer: EditLayer
    step: DeviceStep
    buckets: frozenset[int] = frozenset()

    def arm(self, buckets: frozenset[int]) -> None:
        """Says which buckets have a program here in the next step."""
        if buckets != self.buckets:
            self.buckets = buckets
            self.layer.arm(buckets)

    def edit(self, y: Tensor, read: Tensor | None, residual: Tensor | None) -> None:
        """Edits ``y [T, D]``, and adds to the sums what that did."""
        step, rows = self.step, y.shape[0]
        if not self.buckets or not step.tokens:
            return
        # Rows of the map are rows of the batch: a host that gives a site part of them would edit the wrong ones.
        if not step.tokens <= rows <= step.capacity:
            raise RuntimeError(f"{self.layer.site} got {rows} rows in a step of {step.tokens} tokens")
        self.layer(y, read, residual, step.reports(self.number, rows))
        step.edited(self.number, self.buckets, rows)


@dataclass(slots=True)
class _Run:
    """A steered request on this worker."""

    program: Program
    slot: Slot
    row: int
    columns: Tensor
    prompt_length: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """What does not change while the batch holds the same requests.

    Args:
        requests: The requests, in order.
        rows: The rows of its requests in each bucket; None = it has none there.
        columns: For each bucket, the places of its requests' sums in the flattened table; None = it has none.
        armed: Buckets that have a program at each site.
        ends: Where each steered request's sums end, once they are gathered.
        errors: Requests that could not be steered.
        plan: What its requests have read; None = nothing.
        still: The sums of its requests ``[N]``, where none of them edits and so none changes.
    """

    requests: list[str]
    rows: list[BatchRows | None]
    columns: list[Tensor | None]
    armed: Mapping[Site, frozenset[int]]
    ends: dict[str, int]
    errors: list[str]
    plan: ReadPlan | None
    still: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Carried:
    """What a forward pass did, from stage to stage of a pipeline.

    Args:
        sums: ``[N]`` float64, the sums of the step's steered requests, one after the other.
        touched: ``[T]`` bool, the tokens that were touched at any site.
        reads: ``[n, C]`` float64, what was read, on the CPU but for the way to the next stage; None = nothing.
    """

    sums: Tensor
    touched: Tensor
    reads: Tensor | None = None


class Worker:
    """Steers the part of a model that one worker has.

    Args:
        model: vLLM's model.
        catalog: What the names mean.
        limits: What the slots hold.
        sites: All sites, in the model's order.
        shape: What the model is.
        agree: Whether every process that shares these layers says so; each of them asks once where a slot is filled.

    Raises:
        StartError: Something does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        catalog: Catalog,
        limits: Limits,
        sites: Sequence[Site],
        shape: Shape,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        sharded = [site for site in sites if Kind.Z in (site.read.kind, site.write.kind)]
        if sharded and shape.ranks > 1:
            raise SiteError(
                f"{sharded[0]}: under tensor parallelism no process sees the whole of it, and a feature needs the "
                "whole. Serve with --tensor-parallel-size 1, or use an SAE of the residual stream."
            )
        self.sites = tuple(sites)
        self.catalog = catalog
        self.hooked: list[Site] = []
        buckets = buckets_of(limits)
        self.step = DeviceStep(
            buckets,
            sites=sites,
            capacity=shape.max_tokens,
            vocabulary=shape.vocabulary,
            device=shape.device,
            # On a CPU no kernel runs that would use what these ask for.
            widths=[(shape.width(s.read), shape.width(s.write)) for s in sites] if shape.device.type != "cpu" else (),
        )
        self.editors: dict[str, Editor] = {}
        for number, site in enumerate(sites):
            name = f"sae_steer.{site}"
            if not install(model, site, name):
                continue
            tables = SiteTables.fit(
                site,
                catalog,
                buckets=buckets,
                width=shape.width(site.read),
                width_out=shape.width(site.write),
                dtype=shape.dtype,
                device=shape.device,
            )
            self.editors[name] = Editor(number, EditLayer(tables, self.step, reports=False), self.step)
            self.hooked.append(site)
        wholes = [whole for editor in self.editors.values() for whole in editor.layer.tables.wholes]
        self._space = readout_space(wholes, limits, shape.device)
        warm_up(shape.device, shape.dtype)
        self._runs: dict[str, _Run] = {}
        self._loaded: dict[Slot, str] = {}
        self._agree = agree
        self._errors: dict[str, tuple[str, str]] = {}
        self._batch: _Batch | None = None
        self._reads: StepReads | None = None
        self._features = {e.sae.fingerprint: e.sae.spec.n_features for e in catalog.saes.values()}
        self.harvest: Harvest | None = None
        """What a calibration counts here; None = there is none."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tables and maps, and of what is read through."""
        space = self._space.nbytes if self._space is not None else 0
        return self.step.nbytes + space + sum(editor.layer.tables.nbytes for editor in self.editors.values())

    def describe(self) -> dict[str, Any]:
        """What this worker has, for the front end to compare with what it thinks."""
        return {
            "saes": {name: entry.sae.fingerprint for name, entry in self.catalog.saes.items()},
            "vectors": {name: vector.fingerprint for name, vector in self.catalog.vectors.items()},
            "sites": [str(site) for site in self.hooked],
            "bytes": self.nbytes,
        }

    def forget(self, requests: Sequence[str] | set[str]) -> None:
        """Drops requests that have ended."""
        for request in requests:
            run = self._runs.pop(request, None)
            self._errors.pop(request, None)
            if run is not None:
                self.step.runs[run.slot.bucket].remove(run.row)
                self._batch = None

    def meet(self, request: str, extra_args: Mapping[str, Any] | None, prompt_length: int) -> None:
        """Learns of a request, once it is scheduled; one that was preempted and comes back is known already."""
        if self.harvest is not None:
            self.harvest.meet(request, extra_args)
        if not extra_args or PROGRAM not in extra_args or request in self._runs:
            return
        self._batch = None
        program = parse(extra_args[PROGRAM])
        slot = Slot(*extra_args[SLOT])
        index = slot.index
        if self._loaded.get(slot) != program.digest:
            error = self._load(program, slot)
            if error is not None:
                # Nothing may be raised here: it would end the engine for everybody. The request ends with this error.
                self._errors[request] = (error.code, error.message)
                index = 0
        runs = self.step.runs[slot.bucket]
        row = runs.add(program, index, prompt_length)
        if index == 0:
            runs.sums[row, FAILED] = 1.0  # so says an earlier stage of a pipeline to the last, which has loaded it
        used = torch.from_numpy(columns(program, self.sites, runs.rows)).to(runs.device)
        self._runs[request] = _Run(program, slot, row, used, prompt_length)

    def _load(self, program: Program, slot: Slot) -> SteerError | None:
        """Fills a slot that the scheduler gave to a program; what went wrong, here or in a process like this one."""
        self._loaded.pop(slot, None)
        failure: SteerError | None = None
        try:
            self._write(program, slot)
        except SteerError as error:
            failure = error
            logger.error("A request's program was not loaded: %s", error.message)
        # Copies of one residual stream must be edited alike: where one process cannot, none does.
        if self._agree(failure is None):
            self._loaded[slot] = program.digest
        elif failure is None:
            failure = RunFailed("Another process of the host could not load what steers this request; its log has why.")
        return failure

    def _write(self, program: Program, slot: Slot) -> None:
        parts = {part.site: part for part in program.sites}
        for editor in self.editors.values():
            tables = editor.layer.tables
            if tables.site in parts:
                tables.write(slot.bucket, slot.index, parts[tables.site], program)
            else:
                tables.clear(slot.bucket, slot.index)
        self.step.load(slot.bucket, slot.index, program)

    @traced("sae_steer::begin_step")
    def begin(self, requests: Sequence[str], starts: Tensor, positions: Tensor, tokens: Tensor, count: int) -> None:
        """Lays out the next forward pass.

        Args:
            requests: The requests of the batch, in its order.
            starts: ``[R + 1]`` where each one's tokens start, on the device.
            positions: ``[T]`` absolute positions, on the device.
            tokens: ``[T]`` token ids, on the device.
            count: ``T``.
        """
        if self.harvest is not None:
            self.harvest.begin(requests, starts, positions)
        if self._batch is None or self._batch.requests != requests:
            self._batch = self._plan(requests)
        plan = self._batch.plan
        gathers = plan.gathers if plan is not None else None
        self.step.fill(self._batch.rows, starts, positions, tokens, count, gathers)
        for editor in self.editors.values():
            editor.arm(self._batch.armed.get(editor.layer.site, _NONE))
        self._reads = None
        if plan is not None and self.step.reads is not None:
            self._reads = StepReads(plan, self.step.reads, self._space)
            for editor in self.editors.values():
                self._reads.arm(editor.layer)

    def _plan(self, requests: Sequence[str]) -> _Batch:
        """What does not change while the batch holds the same requests."""
        rows = [np.zeros(len(requests), dtype=np.int64) for _ in self.step.runs]
        armed: dict[Site, set[int]] = {}
        columns_of: list[list[Tensor]] = [[] for _ in rows]
        ends: dict[str, int] = {}
        edits = [False for _ in rows]
        end = 0
        # By bucket, as their sums are gathered.
        for bucket, table in enumerate(self.step.runs):
            for i, request in enumerate(requests):
                run = self._runs.get(request)
                if run is None or run.slot.bucket != bucket:
                    continue
                rows[bucket][i] = run.row
                edits[bucket] |= run.program.edits is not None
                columns_of[bucket].append(run.row * table.sums.shape[1] + run.columns)
                end += len(run.columns)
                ends[request] = end
                for part in run.program.sites:
                    armed.setdefault(part.site, set()).add(bucket)
        device = self.step.device
        batch = _Batch(
            list(requests),
            [BatchRows.of(own, device, edits=which) for own, which in zip(rows, edits, strict=True)],
            [torch.cat(found) if found else None for found in columns_of],
            {site: frozenset(buckets) for site, buckets in armed.items()},
            ends,
            [request for request in requests if request in self._errors],
            self._read_plan(requests),
        )
        return batch if any(edits) or not ends else replace(batch, still=self._sums(batch))

    def _sums(self, batch: _Batch) -> Tensor:
        """``[N]`` the sums of the batch's requests, one after the other."""
        parts: list[Tensor] = []
        for table, own, used in zip(self.step.runs, batch.rows, batch.columns, strict=True):
            if own is not None and used is not None:
                if own.edits:
                    table.judge(own.own)
                parts.append(table.sums.view(-1)[used])
        return torch.cat(parts)

    def _read_plan(self, requests: Sequence[str]) -> ReadPlan | None:
        steered = {name: (run.program, run.slot.bucket, run.prompt_length) for name, run in self._runs.items()}
        runs = read_runs(requests, steered)
        return ReadPlan.make(runs, self.sites, self._features, len(requests), self.step.device) if runs else None

    @traced("sae_steer::end_step")
    def end(self, before: Carried | None) -> Carried | None:
        """Ends the forward pass.

        Args:
            before: What the earlier stages of the pipeline did in this step.

        Returns:
            What was done up to and with this stage; None where no request was steered.
        """
        touched = self.step.finish(before.touched if before is not None else None)
        self.step.clear()
        if touched is None or self._batch is None:
            return None
        sums = self._batch.still if self._batch.still is not None else self._sums(self._batch)
        if before is not None:
            # Sites of other stages are zero here. Touched tokens were handed on, and counted anew.
            heads = torch.tensor([0, *list(self._batch.ends.values())[:-1]], device=sums.device)
            sums = sums + before.sums.to(sums.device).index_fill(0, heads + TOUCHED, 0.0)
        reads = None
        if self._reads is not None:
            reads = self._reads.matrix(before.reads if before is not None else None)
            for editor in self.editors.values():
                editor.layer.readouts = ()
        return Carried(sums, touched, reads)

    def snapshot(self, done: Carried | None) -> Snapshot | None:
        """What the scheduler gets of a step, from the last stage; None where no request was steered."""
        errors = {request: self._errors[request] for request in self._batch.errors} if self._batch is not None else {}
        if done is None or self._batch is None:
            return Snapshot({}, np.zeros(0), errors) if errors else None
        found = Snapshot(self._batch.ends, done.sums.cpu().numpy(), errors)
        if self._reads is not None and done.reads is not None:
            found.reads, found.stops, broken = self._reads.split(done.reads)
            found.errors.update((name, (NonFinite.code, NOT_FINITE)) for name in broken)
        return found
