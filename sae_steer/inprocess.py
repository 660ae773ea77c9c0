"""Steering in the same process: ``with sae_steer.attach(model, saes=...) as steer``, for notebooks and scripts."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_steer.calibration.model import of_model
from sae_steer.capabilities import IN_PROCESS
from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.compiler import compile_program
from sae_steer.errors import LimitExceeded, Unsupported
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.report import Run
from sae_steer.runtime import Runtime
from sae_steer.sae import Sae, open_sae
from sae_steer.schema import Steering, parse_steering
from sae_steer.sites import Site
from sae_steer.step import Span

Request = Mapping[str, Any] | Steering | Program | None
"""What one row asks: the ``steering`` field as a dictionary or validated, a compiled program, or nothing."""


def attach(
    model: PreTrainedModel,
    saes: Mapping[str, str | Path | Sae],
    *,
    vectors: Mapping[str, Tensor | str | Path] | None = None,
    profiles: str | Path | None = None,
    sites: Sequence[str] = (),
    whole: Collection[str] = (),
    limits: Limits | None = None,
) -> "Steer":
    """Hooks SAEs into a model.

    Args:
        model: A transformers model of a known family.
        saes: SAEs by name: a folder, a hub id, or an opened SAE.
        vectors: Plain directions by name: a tensor ``[D]`` or a safetensors file.
        profiles: Folder of profiles.
        sites: Places to hook beside the SAEs' own, for plain vectors.
        whole: Names of SAEs to hold in memory whole, which dropping the error and TopK need.
        limits: How many programs, of how many features, may be at work at once.

    Raises:
        StartError: A checkpoint cannot be read exactly, or does not fit the model.

    Example:
        >>> with sae_steer.attach(model, saes={"res": "path/to/sae"}) as steer:
        ...     clamp = {"interventions": [{"sae": "res", "features": [7], "op": "clamp", "value": 8.0}]}
        ...     with steer.rows([None, clamp]) as rows:
        ...         out = model.generate(**tokenizer([prompt, prompt], return_tensors="pt"), do_sample=False)
        ...     print(rows.reports()[1])
    """
    entries = [
        CatalogSae.make(name, open_sae(source) if isinstance(source, str | Path) else source, whole=name in whole)
        for name, source in saes.items()
    ]
    directions = [
        Vector.make(name, source) if isinstance(source, Tensor) else Vector.load(name, Path(source))
        for name, source in (vectors or {}).items()
    ]
    folder = Path(profiles) if profiles is not None else None
    catalog = Catalog(entries, directions, folder, model=of_model(model) if folder is not None else None)
    return Steer(model, catalog, limits or Limits(), [Site.parse(site) for site in sites])


class Steer:
    """A model with SAEs hooked in; made by :func:`attach`, and undone when its ``with`` block ends."""

    def __init__(self, model: PreTrainedModel, catalog: Catalog, limits: Limits, sites: Sequence[Site]) -> None:
        self.model = model
        self.catalog = catalog
        self.runtime = Runtime.attach(model, catalog, limits=limits, sites=sites)
        self._open = True  # between attach and close
        self._inside = False  # in a block of rows
        bos = model.config.get_text_config().bos_token_id
        self._bos = int(bos) if isinstance(bos, int) else None

    def compile(self, request: Request) -> Program | None:
        """Compiles what a row asks; raises :class:`~sae_steer.errors.RequestError` where it cannot be honoured."""
        if request is None or isinstance(request, Program):
            return request
        steering = request if isinstance(request, Steering) else parse_steering(dict(request))
        runtime = self.runtime
        return compile_program(
            steering, self.catalog, IN_PROCESS, runtime.limits, sites=runtime.sites, bos_token_id=self._bos
        )

    @contextmanager
    def rows(self, requests: Sequence[Request], *, prompt_lengths: Sequence[int] | None = None) -> Iterator["Rows"]:
        """Steers the model inside the block: one request for each row of the batch.

        A batch of a multiple of as many rows (beams, several return sequences) gives each request that many rows.
        Without a cache, forward passes of your own that grow by one token are taken as one generation;
        ``model.generate`` starts a new one each time.

        Args:
            requests: What each row asks; None leaves its row alone, to the bit.
            prompt_lengths: Prompt tokens of each row, without padding. Found from the first forward pass when left out;
                needed where the cache is already filled, or the prompt is fed in chunks.

        Raises:
            RequestError: A request cannot be honoured, or there are more different programs than slots.
        """
        if not self._open:
            raise Unsupported("This attachment is closed, and would steer nothing. Attach again.")
        if self._inside:
            raise Unsupported("One block of rows inside another: give all rows to one block.")
        if not requests:
            raise Unsupported("There are no rows to steer.")
        programs = [self.compile(request) for request in requests]
        self._inside = True
        held: list[Program] = []
        try:
            rows = Rows(self.runtime, programs, prompt_lengths, self._hold(programs, held))
            before = self.model.register_forward_pre_hook(rows.begin, with_kwargs=True)
            after = self.model.register_forward_hook(rows.end)
            inner = self.model.base_model
            within = inner.register_forward_pre_hook(rows.begin_inner) if inner is not self.model else None
            # A pass without a cache looks the same whether it goes on with a generation or starts the next one.
            own = vars(self.model).get("generate")
            generate = cast(Callable[..., Any], self.model.generate)

            def generate_anew(*args: Any, **kwargs: Any) -> Any:
                rows.restart()
                return generate(*args, **kwargs)

            vars(self.model)["generate"] = generate_anew
            try:
                yield rows
            finally:
                if own is None:
                    del vars(self.model)["generate"]
                else:
                    vars(self.model)["generate"] = own
                before.remove()
                after.remove()
                if within is not None:
                    within.remove()
                self.runtime.drop_step()  # of a pass that broke off
        finally:
            self._inside = False
            for program in held:
                self.runtime.release(program)

    def _hold(self, programs: Sequence[Program | None], held: list[Program]) -> dict[str, Any]:
        slots = {}
        for program in programs:
            if program is None or program.digest in slots:
                continue
            slot = self.runtime.acquire(program)
            if slot is None:
                raise LimitExceeded(
                    "There are more different programs in this batch than slots. Pass limits=Limits(max_programs=..., "
                    "wide_programs=...) to attach."
                )
            held.append(program)
            slots[program.digest] = slot
        return slots

    def close(self) -> None:
        """Takes the hooks out of the model."""
        self._open = False
        self.runtime.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Rows:
    """The rows of one batch while the model runs over it."""

    def __init__(
        self,
        runtime: Runtime,
        programs: Sequence[Program | None],
        prompt_lengths: Sequence[int] | None,
        slots: Mapping[str, Any],
    ) -> None:
        self._runtime = runtime
        self._programs = programs
        self._given = prompt_lengths
        self._slots = slots
        self._runs: list[Run | None] = []
        self._length = -1
        self._laid_out = False

    def begin_inner(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model without its head; raises :class:`Unsupported` for a call of its own."""
        if not self._laid_out:
            raise Unsupported("Inside steer.rows, call the model that was attached, not the one inside it.")
        self._laid_out = False  # for this pass alone, also where it breaks off

    def reports(self) -> list[dict[str, Any] | None]:
        """The ``applied`` block of each row of the batch, with ``readings`` and ``triggers`` where it asked for any.

        None for rows that asked for nothing.
        """
        return [self._report(run) if run is not None else None for run in self._runs]

    def _report(self, run: Run) -> dict[str, Any]:
        told = run.reader.finish(self._runtime.catalog.name_of, None, keep=True) if run.reader is not None else {}
        told.pop("trigger", None)  # no trigger ends anything here
        return self._runtime.report(run) | told

    def restart(self) -> None:
        """The next pass is the first of a generation."""
        self._runs, self._length = [], -1

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: lays out the pass.

        Raises:
            Unsupported: The batch is laid out in a way whose positions cannot be told.
        """
        kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        kwargs |= kwargs.pop("kwargs", {})
        tokens = kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        ids: NDArray[np.int64]
        if tokens is not None:
            ids = tokens.cpu().numpy()
        elif embeds is not None:
            ids = np.full(tuple(embeds.shape[:2]), -1)
            if any(s.skip_token is not None or s.token_in for p in self._programs if p for s in p.selectors):
                raise Unsupported("'skip_bos' and 'token_in' need token ids, and the model was given inputs_embeds.")
        else:
            raise Unsupported("The forward pass has neither input_ids nor inputs_embeds.")
        mask = self._mask(kwargs, ids)
        self._restart_if_new(kwargs, ids, mask)
        held = mask[:, -ids.shape[1] :] != 0
        positions = mask.cumsum(axis=1)[:, -ids.shape[1] :] - 1
        spans = [span for row in range(ids.shape[0]) for span in self._spans(row, ids[row], held[row], positions[row])]
        self._runtime.begin_step(spans)
        self._laid_out = True

    def end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Forward hook of the model: gathers what happened; raises a row's failure."""
        self._runtime.end_step()
        for run in self._runs:
            if run is not None and run.failure is not None:
                raise run.failure

    @staticmethod
    def _mask(kwargs: Mapping[str, Any], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[B, past + T]``: 1 for tokens, 0 for padding."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            return np.ones((ids.shape[0], _past(kwargs) + ids.shape[1]), dtype=np.int64)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise Unsupported("Only two-dimensional attention masks tell the positions. Leave static caches out.")
        return mask.cpu().numpy().astype(np.int64)

    def _restart_if_new(self, kwargs: Mapping[str, Any], ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
        """Starts runs at the first pass of a generation; later passes go on with them."""
        past, length = _past(kwargs), mask.shape[1]
        goes_on = self._runs and (past > 0 or length == self._length + 1)
        self._length = length
        if goes_on:
            if past and ids.shape[1] > 1 and self._given is None:
                raise Unsupported("The prompt is fed in chunks. Pass prompt_lengths to steer.rows.")
            return
        if past and self._given is None:
            raise Unsupported("The cache is filled already. Pass prompt_lengths to steer.rows.")
        batch, each = ids.shape[0], ids.shape[0] // max(len(self._programs), 1)
        if not each or batch % len(self._programs):
            raise Unsupported(f"The batch has {batch} rows for {len(self._programs)} requests.")
        lengths = mask.sum(axis=1) if self._given is None else np.repeat(self._given, each)
        self._runs = []
        for row in range(batch):
            program = self._programs[row // each]
            run = self._runtime.start_run(program, self._slots[program.digest], int(lengths[row])) if program else None
            self._runs.append(run)

    def _spans(
        self, row: int, ids: NDArray[np.int64], held: NDArray[np.bool_], positions: NDArray[np.int64]
    ) -> Iterator[Span]:
        """A row as padding, tokens, padding."""
        real = np.flatnonzero(held)
        if real.size == 0:
            yield Span(None, 0, ids.tolist())
            return
        first, last = int(real[0]), int(real[-1]) + 1
        if last - first != real.size:
            raise Unsupported("Padding between tokens: positions cannot be told.")
        yield Span(None, 0, ids[:first].tolist())
        yield Span(self._runs[row], int(positions[first]), ids[first:last].tolist())
        yield Span(None, 0, ids[last:].tolist())


def _past(kwargs: Mapping[str, Any]) -> int:
    """Tokens that the cache holds already."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0
