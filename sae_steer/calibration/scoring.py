"""How likely a model finds texts while it is steered: teacher forced, in batches, in the same process."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_steer.calibration.harvest import pad_of
from sae_steer.catalog import Catalog
from sae_steer.errors import DataError
from sae_steer.inprocess import Request, Steer
from sae_steer.limits import Limits
from sae_steer.sites import Site

_LOGIT_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Passage:
    """A text in tokens.

    Args:
        ids: Token ids.
        first: The first one that is scored, given all before it; at least 1.
    """

    ids: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True, slots=True)
class Score:
    """What a model made of some passages.

    Args:
        log_probability: Of all scored tokens, summed, in nats.
        tokens: How many there are.
        dose: Mean over tokens of ``|delta| / |x|``, largest over sites; 0 where nothing was edited.
        dose_max: Its largest value.
        fired: Pairs of token and feature that an edit changed.
    """

    log_probability: float
    tokens: int
    dose: float = 0.0
    dose_max: float = 0.0
    fired: int = 0

    @property
    def loss(self) -> float:
        """Cross-entropy, nats a token."""
        return -self.log_probability / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, at most ``exp(700)``, which a float still holds."""
        return math.exp(min(self.loss, 700.0))


def passages(ids: Sequence[Sequence[int]], most: int) -> list[Passage]:
    """Whole texts as passages, cut to ``most`` tokens; those of one token predict nothing and are left out."""
    return [Passage(tuple(text[:most])) for text in ids if len(text) > 1]


def steered(catalog: Catalog, model: torch.nn.Module, sites: Sequence[Site] = (), features: int = 1) -> Steer:
    """An attachment with one slot for a program of many features, which is all that scoring needs."""
    limits = Limits(max_programs=1, rows=max(features, 1), wide_programs=0, max_edits=max(features, 1))
    return Steer(model, catalog, limits, sites)  # type: ignore[arg-type]  # a transformers model


@torch.inference_mode()
def score(steer: Steer, texts: Sequence[Passage], request: Request = None, *, batch_tokens: int = 4096) -> Score:
    """Scores passages under one request, applied at every position that it asks for.

    Raises:
        DataError: There is nothing to score.
        RequestError: The request cannot be honoured.
        RunFailed: An edit produced a value that is not finite, or passed its dose limit.
    """
    if not any(len(text.ids) > text.first for text in texts):
        raise DataError("There is no text of two tokens or more to score.")
    vocabulary = int(steer.model.config.get_text_config().vocab_size)
    most = max(1, min(batch_tokens, _LOGIT_BYTES // (4 * vocabulary)))
    program = steer.compile(request)
    total, count, fired, dosed, dose, highest = 0.0, 0, 0, 0, 0.0, 0.0
    for batch in _groups(texts, most):
        ids, mask = _padded(batch, pad_of(steer.model), steer.model.device)
        with steer.rows([program] * len(batch)) as rows:
            logits = steer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for i, text in enumerate(batch):
            wanted = ids[i, text.first : len(text.ids)]
            found = logits[i, text.first - 1 : len(text.ids) - 1].float().log_softmax(dim=-1)
            total += float(found.gather(1, wanted[:, None]).double().sum())
            count += wanted.numel()
        for report in filter(None, rows.reports()):
            fired += report["fired"]
            dosed += report["tokens"]
            dose += report["dose"]["mean"] * report["tokens"]
            highest = max(highest, report["dose"]["max"])
    return Score(total, count, dose / dosed if dosed else 0.0, highest, fired)


def _groups(texts: Sequence[Passage], most: int) -> Iterator[list[Passage]]:
    group: list[Passage] = []
    for text in sorted(texts, key=lambda text: len(text.ids)):
        if group and len(text.ids) * (len(group) + 1) > most:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _padded(texts: Sequence[Passage], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), pad)
    mask = torch.zeros(len(texts), longest, dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i, : len(text.ids)] = torch.tensor(text.ids)
        mask[i, : len(text.ids)] = 1
    return ids.to(device), mask.to(device)
