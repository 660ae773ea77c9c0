"""Texts as the model sees them, in batches of similar length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_steer.calibration.observe import beginning
from sae_steer.errors import DataError


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts in tokens.

    Args:
        ids: Token ids of each, at least two.
        labels: Number of the label of each; all zero where there are none.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int], most: int) -> "Texts":
        """Tokenises texts, cut to ``most`` tokens; those of one token predict nothing and are left out."""
        if not texts:
            return cls((), ())
        texts = [beginning(tokenizer, text, most) for text in texts]
        encoded = tokenizer(texts, truncation=True, max_length=most)["input_ids"]
        kept = [(tuple(ids), label) for ids, label in zip(encoded, labels, strict=True) if len(ids) > 1]
        return cls(tuple(ids for ids, _ in kept), tuple(label for _, label in kept))

    def require(self, least: int, what: str) -> "Texts":
        """Itself; raises :class:`DataError` where there are fewer than ``least``."""
        if len(self) < least:
            raise DataError(f"There are {len(self)} texts {what}; at least {least} are needed.")
        return self


@dataclass(frozen=True, slots=True)
class Batch:
    """Some texts, padded on the right.

    Args:
        rows: Their numbers.
        ids: ``[B, T]`` token ids.
        mask: ``[B, T]`` bool, where a token is.
    """

    rows: tuple[int, ...]
    ids: Tensor
    mask: Tensor


def batches(texts: Texts, *, tokens: int, pad: int, device: torch.device) -> Iterator[Batch]:
    """All texts, at most ``tokens`` a batch with padding; the longest first, so that too long ones fail at once."""
    order = sorted(range(len(texts)), key=lambda row: -len(texts.ids[row]))
    while order:
        longest = len(texts.ids[order[0]])
        count = max(1, tokens // longest)
        rows, order = order[:count], order[count:]
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for at, row in enumerate(rows):
            length = len(texts.ids[row])
            ids[at, :length] = torch.tensor(texts.ids[row])
            mask[at, :length] = True
        yield Batch(tuple(rows), ids.to(device), mask.to(device))
