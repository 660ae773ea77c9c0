"""Deliberately wrong variants of the plugin, switched on in a running engine: each must fail the cases that name it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from sae_steer.device_reads import DeviceReads
from sae_steer.device_step import BatchRows, DeviceStep
from sae_steer.footprint import Footprint
from sae_steer.program import Program, Row
from sae_steer.readings import Reader
from sae_steer.runs import RunTable
from sae_steer.slots import Slot, SlotPool
from sae_steer_vllm import frontend, worker
from sae_steer_vllm.gate import Gate
from sae_steer_vllm.outbox import Outbox
from sae_steer_vllm.worker import Editor, Worker

Patch = tuple[Any, str, Callable[[Any], Any]]
"""Whose attribute, its name, and from what it is to what it shall be."""
_INF = float("inf")
_FAR = 2**62


def _programs(change: Callable[[Program], Program]) -> Patch:
    """The worker takes every program for another one."""
    return worker, "parse", lambda parse: lambda text: change(parse(text))


def _rows(change: Callable[[Row], Row]) -> Patch:
    def changed(program: Program) -> Program:
        return replace(program, sites=tuple(replace(s, rows=tuple(map(change, s.rows))) for s in program.sites))

    return _programs(changed)


def _selectors(**changes: Any) -> Patch:
    return _programs(
        lambda program: replace(program, selectors=tuple(replace(s, **changes) for s in program.selectors))
    )


def _idle(row: Row) -> Row:
    """A row with f' = f."""
    return replace(row, scale=1.0, shift=0.0, lo=-_INF, hi=_INF, mask_lo=_INF, mask_hi=-_INF)


def _first_row(program: Program) -> Program:
    """All rows of a site but the first do nothing."""
    return replace(program, sites=tuple(replace(s, rows=(s.rows[0], *map(_idle, s.rows[1:]))) for s in program.sites))


def _first_place(program: Program) -> Program:
    first, *others = program.sites
    return replace(program, sites=(first, *(replace(s, rows=tuple(map(_idle, s.rows))) for s in others)))


def _keep(program: Program) -> Program:
    return replace(program, sites=tuple(replace(s, drop=None) for s in program.sites))


def _closed(program: Program) -> Program:
    """Ranges hold their end."""
    selectors = (replace(s, ranges=tuple((a, b + 1) for a, b in s.ranges)) for s in program.selectors)
    return replace(program, selectors=tuple(selectors))


def _scales(original: Any) -> Any:
    """A dose beyond the limit is scaled down, whatever was asked; also to the front end, which judges it too."""

    def compile_program(*args: Any, **kwargs: Any) -> Program | None:
        program = original(*args, **kwargs)
        return replace(program, on_dose="scale") if program is not None else None

    return compile_program


def _residual_alone(original: Any) -> Any:
    def edit(self: Editor, y: Any, read: Any, residual: Any) -> None:
        original(self, y, read if residual is None else residual, None)

    return edit


def _one_token_is_completion(original: Any) -> Any:
    """The phase is told by how many tokens of a request are in the step."""

    def fill(self: DeviceStep, batch: Any, starts: Any, *more: Any) -> None:
        right = [run.starts for run in self.runs]
        for own, run in zip(batch, self.runs, strict=True):
            run.starts = run.starts.clone()
            for number, row in enumerate(own.rows[:-1].tolist() if own is not None else ()):
                if row:
                    later = run.starts[row, 1:]
                    later[later < _FAR] = 0 if starts[number + 1] - starts[number] == 1 else _FAR
        original(self, batch, starts, *more)
        for run, kept in zip(self.runs, right, strict=True):
            run.starts = kept

    return fill


def _completion_from_p(original: Any) -> Any:
    return lambda self, program, slot, prompt_length: original(self, program, slot, prompt_length + 1)


def _positions_from_the_step(original: Any) -> Any:
    def fill(self: DeviceStep, batch: Any, starts: Any, positions: Any, ids: Any, count: int, *more: Any) -> None:
        requests = max((len(own.rows) - 1 for own in batch if own is not None), default=0)
        place = torch.arange(count)
        request = torch.searchsorted(starts[1 : requests + 1].long().contiguous(), place, right=True)
        original(self, batch, starts, place - starts[request], ids, count, *more)

    return fill


def _neighbour(original: Any) -> Any:
    def moved(own: BatchRows) -> BatchRows:
        return replace(own, rows=torch.cat([own.rows[:-1].roll(1), own.rows[-1:]]))

    def fill(self: DeviceStep, batch: Any, *args: Any) -> None:
        original(self, [own and moved(own) for own in batch], *args)

    return fill


def _first_choice(original: Any) -> Any:
    def meet(self: Worker, request: str, *args: Any) -> None:
        if not request.startswith("1_"):
            original(self, request, *args)

    return meet


def _freed_early(original: Any) -> Any:
    def release(self: SlotPool, digest: str) -> None:
        while digest in self._held:
            original(self, digest)

    return release


def _no_waiting(original: Any) -> Any:
    def enter(self: Gate[Any], name: str, *args: Any, **kwargs: Any) -> Slot:
        slot = original(self, name, *args, **kwargs)
        if slot is None:
            self.drop([name])
        return slot or Slot(0, 1)

    return enter


def _counted_again(original: Any) -> Any:
    def fill(self: DeviceStep, *args: Any) -> None:
        for run in self.runs:
            run.seen.fill_(-1)
        original(self, *args)

    return fill


def _gathered(after: bool) -> Callable[[Any], Any]:
    """Everything is read after the edits, or everything before."""

    def wrong(original: Any) -> Any:
        def gather(self: DeviceReads, site: int, reports: Any) -> None:
            one = [replace(r, before=r.after) if after else replace(r, after=r.before) for r in reports]
            original(self, site, one)

        return gather

    return wrong


def _wide_idle(original: Any) -> Any:
    return lambda self, buckets: original(self, buckets & {0})


def _next_token(original: Any) -> Any:
    return lambda gathers, step, *args: original(gathers, replace(step, wanted=step.wanted.roll(1)), *args)


def _off_by_one(original: Any) -> Any:
    return lambda self, positions, *args: original(self, positions + 1, *args)


def _last_step(original: Any) -> Any:
    def put(self: Outbox, reads: Any, stops: Any) -> None:
        for name in reads:
            self.take(name)
        original(self, reads, stops)

    return put


def _digest_alone(original: Any) -> Any:
    return lambda self, start, end: self.digest if original(self, start, end) is not None else None


VARIANTS: dict[str, Patch] = {
    # What is computed.
    "residual alone": (Editor, "edit", _residual_alone),
    "f' written for f' - f": _rows(lambda row: replace(row, scale=row.scale + 1)),
    "raw units": _rows(lambda row: replace(row, norm_units=False)),
    "no bounds": _rows(lambda row: replace(row, lo=-_INF, hi=_INF)),
    "no mask": _rows(lambda row: replace(row, mask_lo=_INF, mask_hi=-_INF)),
    "no gate": _rows(lambda row: replace(row, gate=None)),
    "no gain table": _rows(lambda row: replace(row, gain=None)),
    "strength of one": _rows(lambda row: replace(row, gamma=1.0)),
    "vector of length one": _rows(lambda row: replace(row, unit=True)),
    "vector as stored": _rows(lambda row: replace(row, unit=False)),
    "first row alone": _programs(_first_row),
    "first place alone": _programs(_first_place),
    "error kept": _programs(
        lambda program: replace(program, sites=tuple(replace(s, drop=None) for s in program.sites))
    ),
    "no dose limit": _programs(lambda program: replace(program, dose_limit=_INF)),
    "dose never fails": (frontend, "compile_program", _scales),
    "wide slots idle": (Editor, "arm", _wide_idle),
    # Where it holds.
    "one token means completion": (DeviceStep, "fill", _one_token_is_completion),
    "completion from P": (RunTable, "add", _completion_from_p),
    "positions from the step's start": (DeviceStep, "fill", _positions_from_the_step),
    "ranges closed": _programs(_closed),
    "no skip_bos": _selectors(skip_token=None),
    "any token": _selectors(token_in=None),
    "one selector": _rows(lambda row: replace(row, selector=min(row.selector, 0))),
    # Whose it is.
    "neighbour's program": (DeviceStep, "fill", _neighbour),
    "first choice alone": (Worker, "meet", _first_choice),
    "slot freed by the first who leaves": (SlotPool, "release", _freed_early),
    "no waiting": (Gate, "enter", _no_waiting),
    "counted again after a preemption": (DeviceStep, "fill", _counted_again),
    # What is read.
    "f' read for f": (DeviceReads, "gather", _gathered(after=True)),
    "f read for f'": (DeviceReads, "gather", _gathered(after=False)),
    "positions of what is read off by one": (Reader, "take", _off_by_one),
    "read of the next token": (DeviceReads, "of", _next_token),
    "readings of the last step alone": (Outbox, "put", _last_step),
    "hit beyond what is read": (Program, "first_read", lambda original: lambda self, prompt_length: None),
    # What is shared.
    "no cache key": (Footprint, "key", lambda original: lambda self, start, end: None),
    "digest alone as the cache key": (Footprint, "key", _digest_alone),
    "one key for all blocks": (Footprint, "key", lambda original: lambda self, start, end: self.digest),
}
"""By what is wrong."""


@contextmanager
def switched_on(variant: str | None) -> Iterator[None]:
    """Within the block, the plugin of this process is wrong in that way."""
    if variant is None:
        yield
        return
    owner, name, change = VARIANTS[variant]
    original = getattr(owner, name)
    setattr(owner, name, change(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
