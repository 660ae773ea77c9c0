"""Which features tell one kind of text from another: ranked, with what ablating them costs and where they fire."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from sae_steer.calibration.choose import Candidate, choose
from sae_steer.calibration.harvest import Harvester, observe, pad_of, tapped
from sae_steer.calibration.info import CalibrationSettings
from sae_steer.calibration.observe import Observed, batches
from sae_steer.calibration.scoring import Passage, score, steered
from sae_steer.calibration.statistics import Statistics
from sae_steer.catalog import Catalog, CatalogSae

LABELS = ("negative", "positive")
POSITIVE = LABELS.index("positive")
CONTEXT = 12
"""Tokens that an example shows on either side."""


@dataclass(frozen=True, slots=True)
class Example:
    """A place where a feature fires.

    Args:
        value: Its activation.
        label: Of the text.
        line: Of the text in its file.
        before: Text before the token.
        token: The token.
        after: Text behind it.
    """

    value: float
    label: str
    line: int
    before: str
    token: str
    after: str


@dataclass(frozen=True, slots=True)
class Found:
    """A feature that tells positive from negative text.

    Args:
        candidate: The evidence.
        effect: Change of the loss on positive text where the feature is ablated, nats a token; None = not measured.
        name: What the SAE's files call it.
        examples: Where it fires most, one for each text.
    """

    candidate: Candidate
    effect: float | None = None
    name: str | None = None
    examples: tuple[Example, ...] = ()


def ranked(
    statistics: Statistics, documents: Sequence[int], settings: CalibrationSettings, by: str, count: int
) -> list[Candidate]:
    """The best features by ``separability``, ``dprime`` or ``rate`` (difference of the firing rates)."""
    wide = settings.model_copy(update={"cap": max(count, min(statistics.features, 16384))})
    [found] = choose(statistics, documents, wide, [POSITIVE]).candidates
    keys: dict[str, Callable[[Candidate], float]] = {
        "separability": lambda c: c.distance,
        "dprime": lambda c: c.dprime,
        "rate": lambda c: c.rate - c.rate_rest,
    }
    return sorted(found, key=lambda c: (-keys[by](c), c.feature))[:count]


def effects(
    harvester: Harvester,
    entry: CatalogSae,
    features: Sequence[int],
    texts: Sequence[Passage],
    tick: Callable[[], object],
) -> list[float]:
    """Change of the loss on ``texts`` where each feature alone is ablated, nats a token.

    Raises:
        DataError: The texts are too short to score.
    """
    with steered(Catalog([entry]), harvester.model) as steer:
        plain = score(steer, texts, batch_tokens=harvester.batch_tokens).loss
        found = []
        for feature in features:
            ask = {"interventions": [{"sae": entry.name, "features": [feature], "op": "ablate"}]}
            found.append(score(steer, texts, ask, batch_tokens=harvester.batch_tokens).loss - plain)
            tick()
    return found


def examples(
    harvester: Harvester,
    tokenizer: PreTrainedTokenizerBase,
    windows: Iterable[Sequence[Observed]],
    features: Sequence[int],
    count: int,
    tick: Callable[[int], object],
) -> dict[int, tuple[Example, ...]]:
    """Where features fire most, at most once in a text.

    Args:
        harvester: The model and the dictionary.
        tokenizer: Turns tokens back to text.
        windows: Texts, every token of which is an observation.
        features: The features.
        count: Examples of each.
        tick: Told how many texts were run.
    """
    heaps: dict[int, list[tuple[float, int, int, Observed]]] = {feature: [] for feature in features}
    wanted = np.zeros(harvester.encoder.features, dtype=np.bool_)
    wanted[list(features)] = True
    serial = 0
    with tapped(harvester.model, [harvester.place]) as tensors:
        for texts in windows:
            for batch in batches(texts, harvester.batch_tokens, pad_of(harvester.model)):
                active = harvester.encoder(observe(harvester.model, batch, tensors)[harvester.place])
                mine = wanted[active.features]
                rows, ids, values = active.rows[mine], active.features[mine], active.values[mine]
                place, position = batch.rows.numpy()[rows], batch.positions.numpy()[rows]
                seen: set[tuple[int, int]] = set()
                for i in np.argsort(-values, kind="stable"):
                    key = int(ids[i]), int(place[i])
                    if key in seen:
                        continue  # a stronger token of the same text
                    seen.add(key)
                    serial += 1
                    item = (float(values[i]), -serial, int(position[i]), batch.texts[key[1]])
                    (heapq.heappush if len(heaps[key[0]]) < count else heapq.heappushpop)(heaps[key[0]], item)
            tick(len(texts))
    return {
        feature: tuple(_example(tokenizer, value, position, text) for value, _, position, text in sorted(heap)[::-1])
        for feature, heap in heaps.items()
    }


def _example(tokenizer: PreTrainedTokenizerBase, value: float, position: int, text: Observed) -> Example:
    def plain(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""

    first = max(0, position - CONTEXT)
    before = plain(text.ids[first:position])
    # Decoded together, then cut: alone, some tokenizers drop the space before a token.
    through = plain(text.ids[first : position + 1])
    token = through[len(before) :] if through.startswith(before) else plain([text.ids[position]])
    whole = plain(text.ids[first : position + 1 + CONTEXT])
    after = (
        whole[len(through) :] if whole.startswith(through) else plain(text.ids[position + 1 : position + 1 + CONTEXT])
    )
    return Example(value, text.row.labels[0], text.row.line, before, token, after)
