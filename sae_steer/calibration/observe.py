"""Which tokens of labelled texts are observations, and batches of texts that a model takes at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_steer.calibration.data import Text
from sae_steer.errors import DataError

Tokens = Literal["last", "all", "labelled-span"]
_CHARACTERS = 16  # of a token; few texts have more on average, and where they do, more is taken
_MARGIN = 64  # tokens before a cut that may differ from those of the whole text: a word may be cut in two


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> str:
    """As much of a text as its first ``most`` tokens need, and more; the whole text where it is short."""
    end = _CHARACTERS * (most + _MARGIN)
    while end < len(text):
        start = text[:end]
        ids = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= most + _MARGIN:
            return start
        end *= 2
    return text


@dataclass(frozen=True, slots=True)
class Observing:
    """How texts become observations.

    Args:
        tokens: ``last`` = the last token of a text; ``all`` = each; ``labelled-span`` = those of the labelled span.
        max_length: Tokens of a text that the model takes; what is beyond is cut off.
        span: Which tokens of a span: the ``last``, where a word is complete, or ``all``.
        skip_bos: Whether a beginning-of-sequence token is no observation.
    """

    tokens: Tokens = "last"
    max_length: int = 512
    span: Literal["last", "all"] = "last"
    skip_bos: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """One text in tokens.

    Args:
        ids: Its token ids.
        positions: Those that are observations; none where a span is in the part that was cut off.
        labels: Numbers of its labels.
        cut: Whether something was cut off.
        row: The text.
    """

    ids: list[int]
    positions: list[int]
    labels: tuple[int, ...]
    cut: bool
    row: Text


class Tokeniser:
    """From texts to tokens and observations.

    Args:
        tokenizer: The model's.
        how: Which tokens are observations.
        labels: All labels, in the order of their numbers.

    Raises:
        DataError: Spans cannot be told with this tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, how: Observing, labels: Sequence[str]) -> None:
        if how.tokens == "labelled-span" and not tokenizer.is_fast:
            raise DataError(
                "--tokens labelled-span needs a fast tokenizer, and this model has none. Use --tokens last."
            )
        self._tokenizer, self._how = tokenizer, how
        self._numbers = {label: number for number, label in enumerate(labels)}
        bos = tokenizer.bos_token_id
        self._bos = bos if isinstance(bos, int) else None

    def __call__(self, rows: Sequence[Text]) -> list[Observed]:
        """The rows in tokens, in order; raises :class:`DataError` for a text without any."""
        spans = self._how.tokens == "labelled-span"
        texts = [beginning(self._tokenizer, row.text, self._how.max_length) for row in rows]
        encoded = self._tokenizer(texts, return_offsets_mapping=spans, verbose=False)
        found = []
        for i, row in enumerate(rows):
            ids = list(encoded["input_ids"][i])
            if not ids:
                raise DataError(f"line {row.line}: the tokenizer makes no token of this text.")
            cut, ids = len(ids) > self._how.max_length, ids[: self._how.max_length]
            positions = self._span(row, encoded["offset_mapping"][i][: len(ids)]) if spans else self._positions(ids)
            found.append(Observed(ids, positions, tuple(self._numbers[label] for label in row.labels), cut, row))
        return found

    def _positions(self, ids: list[int]) -> list[int]:
        if self._how.tokens == "last":
            return [len(ids) - 1]
        return [p for p, token in enumerate(ids) if not (self._how.skip_bos and token == self._bos)]

    def _span(self, row: Text, offsets: Sequence[tuple[int, int]]) -> list[int]:
        if row.span is None:
            raise DataError(f"line {row.line}: no span; name its columns with --span-columns or --word-column.")
        start, end = row.span
        inside = [p for p, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
        complete = bool(inside) and offsets[inside[-1]][1] >= end
        if self._how.span == "all":
            return inside
        return inside[-1:] if complete else []


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts side by side, padded on the right.

    Args:
        ids: ``[B, T]`` int64.
        mask: ``[B, T]`` int64, 1 for tokens.
        rows: ``[n]`` int64, the text of each observation.
        positions: ``[n]`` int64.
        labels: ``[n]``, the labels of each.
        texts: The texts.
        tokens: Tokens without padding.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    positions: Tensor
    labels: list[tuple[int, ...]]
    texts: list[Observed]
    tokens: int


def batches(observed: Sequence[Observed], batch_tokens: int, pad: int) -> Iterator[Batch]:
    """Texts of similar length together, of at most ``batch_tokens`` with their padding (one text may be longer)."""
    group: list[Observed] = []
    for text in sorted(observed, key=lambda text: len(text.ids)):
        if group and len(text.ids) * (len(group) + 1) > batch_tokens:
            yield _batch(group, pad)
            group = []
        group.append(text)
    if group:
        yield _batch(group, pad)


def _batch(texts: list[Observed], pad: int) -> Batch:
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), pad)
    mask = torch.zeros(len(texts), longest, dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i, : len(text.ids)] = torch.tensor(text.ids)
        mask[i, : len(text.ids)] = 1
    places = [(i, p) for i, text in enumerate(texts) for p in text.positions]
    where = torch.tensor(places, dtype=torch.int64).view(-1, 2)
    labels = [texts[i].labels for i, _ in places]
    return Batch(ids, mask, where[:, 0], where[:, 1], labels, list(texts), int(mask.sum()))
