"""Calibration where the model is served: workers add up what a dictionary does on labelled texts, and hand over sums.

A text is an ordinary request of one output token, which says in its ``extra_args`` which of its positions are
observations and what their labels are. Each position counts once, also where a request is preempted and computed again.
Under tensor parallelism the residual stream is the same in every process, and the first one counts; in a pipeline the
stage that has the place does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.harvest import Progress, Window
from sae_steer.calibration.observe import Observed, Tokeniser
from sae_steer.calibration.statistics import Statistics
from sae_steer.catalog import Catalog
from sae_steer.errors import NonFinite, StartError
from sae_steer_vllm.hooks import listen

HARVEST = "sae_steer_harvest"
"""Key of a request's ``extra_args``, and name of what workers are asked with: ``start`` or ``take``."""


class Harvest:
    """The statistics of one worker.

    Args:
        encoder: The dictionary.
        labels: ``C``.
        limit: Bins of the histograms.
    """

    def __init__(self, encoder: Encoder, labels: int, limit: int) -> None:
        self._encoder, self._labels, self._limit = encoder, labels, limit
        self._statistics = Statistics(encoder.features, labels, limit)
        self._wanted: dict[str, tuple[tuple[int, ...], set[int]]] = {}
        self._rows: list[int] = []
        self._row_labels: list[tuple[int, ...]] = []
        self._failure: str | None = None

    @classmethod
    def start(cls, model: nn.Module, catalog: Catalog, payload: bytes, device: torch.device) -> Self | None:
        """Listens at the place that the named SAE reads; None where another stage of a pipeline has it.

        Raises:
            SiteError: The model has no such place.
        """
        ask = json.loads(payload)
        entry = catalog.saes[ask["sae"]]
        made = cls(Encoder(entry.sae, device), ask["labels"], ask["limit"])
        return made if listen(model, entry.site.read, made.see) else None

    def meet(self, request: str, extra_args: Mapping[str, Any] | None) -> None:
        """Learns of a request, once it is scheduled; one that was preempted and comes back is known already."""
        if extra_args and HARVEST in extra_args and request not in self._wanted:
            count, *rest = extra_args[HARVEST]
            self._wanted[request] = tuple(rest[:count]), set(rest[count:])

    def begin(self, requests: Sequence[str], starts: Tensor, positions: Tensor) -> None:
        """Lays out the next forward pass; arguments as of :meth:`sae_steer_vllm.worker.Worker.begin`."""
        self._rows, self._row_labels = [], []
        ends = starts[: len(requests) + 1].tolist()
        places = positions[: ends[-1]].tolist()
        for i, request in enumerate(requests):
            if request not in self._wanted:
                continue
            labels, left = self._wanted[request]
            for row in range(ends[i], ends[i + 1]):
                if places[row] in left:
                    self._rows.append(row)
                    self._row_labels.append(labels)
                    left.discard(places[row])

    def see(self, x: Tensor, residual: Tensor | None) -> None:
        """Counts the observations of a pass; ``x [T, D]``, and what is added to it where the model keeps it apart."""
        if not self._rows:
            return
        rows = torch.tensor(self._rows, device=x.device)
        picked = x[rows].float()
        if residual is not None:
            picked = picked + residual[rows].float()
        # Nothing may be raised here: it would end the engine.
        if bool(picked.isfinite().all()):
            self._statistics.add(self._row_labels, self._encoder(picked))
        else:
            self._failure = "The model computes values that are not finite."
        self._rows = []

    def take(self) -> bytes:
        """Hands over what was counted since the last time; raises :class:`NonFinite`."""
        if self._failure is not None:
            raise NonFinite(self._failure)
        content = save(self._statistics.tensors())
        self._statistics = Statistics(self._encoder.features, self._labels, self._limit)
        self._wanted.clear()
        return content


class Offline(Protocol):
    """What is used of ``vllm.LLM``."""

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> Any:
        """Runs requests to their end."""
        ...

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        """Asks every worker."""
        ...


class VllmHarvester:
    """Feeds the observations of texts to one dictionary's statistics, through an engine in this process.

    Args:
        llm: ``vllm.LLM`` with the plugin's configuration, eager and without a prefix cache.
        params: Makes ``SamplingParams`` of one output token with these ``extra_args``.
        tokeniser: From texts to observations.
        sae: The dictionary's name in that configuration.
        labels: ``C``.
        limit: Bins of the histograms in each worker.

    Raises:
        StartError: The place is in none of the engine's workers.
    """

    def __init__(
        self,
        llm: Offline,
        params: Callable[[dict[str, Any]], Any],
        tokeniser: Tokeniser,
        *,
        sae: str,
        labels: int,
        limit: int,
    ) -> None:
        self._llm, self._params, self._tokeniser = llm, params, tokeniser
        ask = json.dumps({"sae": sae, "labels": labels, "limit": limit}).encode()
        if not any(llm.collective_rpc(HARVEST, args=("start", ask))):
            raise StartError(f"No worker of the engine has the place that SAE {sae!r} reads.")

    def run(self, window: Window, into: Statistics, progress: Progress) -> None:
        """Runs a window's texts; raises :class:`~sae_steer.errors.DataError` for a text without a token."""
        texts = self._tokeniser(window.texts)
        progress.add(texts)
        wanted = [text for text in texts if text.positions]
        prompts = [{"prompt_token_ids": text.ids} for text in wanted]
        self._llm.generate(prompts, [self._params({HARVEST: _asked(text)}) for text in wanted], use_tqdm=False)
        for part in self._llm.collective_rpc(HARVEST, args=("take", b"")):
            if part:
                into.merge(load(part))


def _asked(text: Observed) -> list[int]:
    return [len(text.labels), *text.labels, *text.positions]


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raises :class:`StartError` for engine arguments under which not every token would be seen, or seen once."""
    reasons = {
        "enforce_eager": "harvesting looks into the model while it runs eagerly",
        "enable_prefix_caching": "a block that is found in the cache is not computed, and so not seen",
        "additional_config": "the plugin is configured by the command",
        "model": "the model is named with --model",
        "dtype": "the element type is named with --dtype",
    }
    for name, reason in reasons.items():
        if name in options:
            raise StartError(f"--engine-args: {name} is not yours to set: {reason}.")
    if int(options.get("data_parallel_size", 1)) > 1:
        raise StartError("--engine-args: data_parallel_size: run one command for each part of the data instead.")
