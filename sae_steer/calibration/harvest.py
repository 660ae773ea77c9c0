"""Runs labelled texts through a transformers model and hands out what is at chosen places, batch by batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_steer.calibration.data import Fault, Reader, Text
from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.observe import Batch, Observed, Tokeniser, batches
from sae_steer.calibration.statistics import Statistics
from sae_steer.errors import DataError, NonFinite, WidthMismatch
from sae_steer.families import locate, width
from sae_steer.sites import Place

WINDOW = 256
"""Texts that are sorted by length together; batches never cross a window, so that a resumed run has the same ones."""
WINDOW_CHARACTERS = 2**20
"""A window ends with the text that reaches this, so that long texts take no more memory than short ones."""
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Window:
    """Some consecutive texts, and where the file goes on behind them: byte and line."""

    texts: list[Text]
    offset: int
    line: int


def windows(reader: Reader, size: int = WINDOW) -> Iterator[Window]:
    """The texts of a surveyed file; rows that cannot be used are left out, as the survey allowed or refused them."""
    texts: list[Text] = []
    characters = 0
    for row in reader:
        if not isinstance(row, Fault):
            texts.append(row)
            characters += len(row.text)
        if len(texts) == size or characters >= WINDOW_CHARACTERS:
            yield Window(texts, reader.offset, reader.line)
            texts, characters = [], 0
    if texts:
        yield Window(texts, reader.offset, reader.line)


@contextmanager
def tapped(model: PreTrainedModel, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
    """Inside the block, every forward pass leaves the tensors at ``places`` in the dictionary.

    Raises:
        SiteError: The model has no such place.
    """
    found: dict[Place, Tensor] = {}
    handles = []

    def keep(place: Place, side: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            found[place] = args[0] if args else kwargs["hidden_states"]

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[place] = output if isinstance(output, Tensor) else output[0]

        return before if side == "input" else after

    try:
        for place in dict.fromkeys(places):
            module, side = locate(model, place)
            hook = keep(place, side)
            if side == "input":
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def observe(model: PreTrainedModel, batch: Batch, found: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """Runs a batch; the observations' rows ``[n, D]`` at every tapped place, in float32.

    Raises:
        NonFinite: The model computed a value that is not finite.
    """
    device = model.device
    # Without the head, whose output nobody asks for.
    model.base_model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False)
    rows, positions = batch.rows.to(device), batch.positions.to(device)
    picked = {place: x[rows, positions].float() for place, x in found.items()}
    for place, x in picked.items():
        if not bool(x.isfinite().all()):
            lines = sorted({batch.texts[i].row.line for i in batch.rows[~x.isfinite().all(dim=1).cpu()].tolist()})
            raise NonFinite(
                f"The model computes values that are not finite at {place}, for the text of line {lines[0]}."
            )
    return picked


def check_width(model: PreTrainedModel, place: Place, encoder: Encoder, name: str) -> None:
    """Raises :class:`WidthMismatch` where an SAE does not read what the model has at a place."""
    have = width(model, place)
    if encoder.width != have:
        raise WidthMismatch(
            f"SAE {name!r} reads vectors of width {encoder.width}, and the model's {place} has width {have}. It was "
            "trained on another model, or on another place of it."
        )


@dataclass(slots=True)
class Progress:
    """What has been run.

    Args:
        texts: Texts.
        tokens: Tokens of them.
        cut: Texts that were longer than the model takes.
        unseen: Texts without an observation: their span was cut off.
    """

    texts: int = 0
    tokens: int = 0
    cut: int = 0
    unseen: int = 0

    def add(self, texts: Sequence[Observed]) -> None:
        """Counts texts."""
        self.texts += len(texts)
        self.tokens += sum(len(text.ids) for text in texts)
        self.cut += sum(text.cut for text in texts)
        self.unseen += sum(not text.positions for text in texts)


class Harvester:
    """Feeds the observations of texts to one dictionary's statistics.

    Args:
        model: The model.
        tokeniser: From texts to observations.
        encoder: The dictionary.
        place: What it reads.
        batch_tokens: Tokens of a batch, with padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokeniser: Tokeniser,
        encoder: Encoder,
        place: Place,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.model, self.tokeniser, self.encoder, self.place = model, tokeniser, encoder, place
        self.batch_tokens = batch_tokens

    def run(self, window: Window, into: Statistics, progress: Progress) -> None:
        """Runs a window's texts.

        Raises:
            DataError: A text has no token.
            NonFinite: The model computed a value that is not finite.
        """
        observed = self.tokeniser(window.texts)
        progress.add(observed)
        with tapped(self.model, [self.place]) as found:
            for batch in batches(observed, self.batch_tokens, pad_of(self.model)):
                if batch.labels:
                    into.add(batch.labels, self.encoder(observe(self.model, batch, found)[self.place]))


def pad_of(model: PreTrainedModel) -> int:
    """A token id to pad with; the mask hides it."""
    pad = model.config.get_text_config().pad_token_id
    return pad if isinstance(pad, int) and pad >= 0 else 0


def context_of(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens of a text that are run: the model's context, or less where it is asked for.

    Raises:
        DataError: More is asked for, or the model does not say how much it takes.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is None and most is None:
        raise DataError("The model's configuration does not say how long its context is. Say it with --max-length.")
    if wanted is not None and most is not None and wanted > most:
        raise DataError(f"--max-length {wanted} is more than the model's context of {most}.")
    return int(wanted or most or 0)
