"""The concept separability score of several dictionaries at once, beside the model's own coordinates there.

One pass of the texts through the model serves all of them. Every score has its chance level: the same statistics under
labels drawn at random, since a distance between two histograms of finite samples is never zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sae_steer.calibration.choose import Candidate, choose
from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.estimate import Estimate, blocks
from sae_steer.calibration.harvest import BATCH_TOKENS, Progress, Window, observe, pad_of, tapped
from sae_steer.calibration.info import CalibrationSettings
from sae_steer.calibration.observe import Tokeniser, batches
from sae_steer.calibration.raw import Sample
from sae_steer.calibration.statistics import Statistics
from sae_steer.sites import Place


@dataclass(frozen=True, slots=True)
class Dictionary:
    """An SAE whose features are scored.

    Args:
        name: Its name.
        encoder: Its encoder.
        place: What it reads.
    """

    name: str
    encoder: Encoder
    place: Place


@dataclass(frozen=True, slots=True)
class Scores:
    """The score of all features of a dictionary, or of all coordinates of a place.

    Args:
        name: The SAE's name; ``raw`` for coordinates.
        place: Where.
        ids: ``[n]`` features that fired, or all coordinates.
        values: ``[n]`` the score of each.
        chance: Mean score where labels are drawn at random.
        never_fired: Features without a score.
        candidates: For each label its best features; none for coordinates.
        estimates: For each label, the estimate of the best feature's densities; none for coordinates.
    """

    name: str
    place: Place
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    chance: float
    never_fired: int = 0
    candidates: tuple[tuple[Candidate, ...], ...] = ()
    estimates: tuple[Estimate | None, ...] = ()

    @property
    def mean(self) -> float:
        """Over features that fired; 0 where none did."""
        return float(self.values.mean()) if self.values.size else 0.0

    def quantile(self, share: float) -> float:
        """Of the values."""
        return float(np.quantile(self.values, share)) if self.values.size else 0.0


class Separation:
    """Runs texts and scores dictionaries.

    Args:
        model: The model.
        tokeniser: From texts to observations.
        dictionaries: The SAEs.
        documents: ``[C]`` texts of each label.
        limit: Bins of each dictionary's histograms, 16 bytes each.
        batch_tokens: Tokens of a batch, with padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokeniser: Tokeniser,
        dictionaries: Sequence[Dictionary],
        documents: Sequence[int],
        *,
        limit: int = 2**24,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._model, self._tokeniser, self._dictionaries = model, tokeniser, dictionaries
        self._documents, self._batch_tokens = list(documents), batch_tokens
        count = len(documents)
        self._own = [Statistics(d.encoder.features, count, limit) for d in dictionaries]
        self._drawn = [Statistics(d.encoder.features, count, limit) for d in dictionaries]
        self._samples = {d.place: Sample(d.encoder.width, count) for d in dictionaries}
        self._share = np.array(documents) / sum(documents)

    def run(self, window: Window, progress: Progress) -> None:
        """Runs a window's texts."""
        texts = self._tokeniser(window.texts)
        progress.add(texts)
        with tapped(self._model, list(self._samples)) as found:
            for batch in batches(texts, self._batch_tokens, pad_of(self._model)):
                if not batch.labels:
                    continue
                picked = observe(self._model, batch, found)
                drawn = self._draw([text.row.line for text in batch.texts])
                random = [(drawn[i],) for i in batch.rows.tolist()]
                for number, dictionary in enumerate(self._dictionaries):
                    active = dictionary.encoder(picked[dictionary.place])
                    self._own[number].add(batch.labels, active)
                    self._drawn[number].add(random, active)
                for place, sample in self._samples.items():
                    sample.add(batch.labels, picked[place])

    def _draw(self, lines: Sequence[int]) -> list[int]:
        """A label for each text, by its line alone."""
        return [int(np.random.default_rng(line).choice(self._share.size, p=self._share)) for line in lines]

    def scores(self, settings: CalibrationSettings, concepts: Sequence[int]) -> list[Scores]:
        """The scores of every dictionary, and of the coordinates of every place, in the model's order of places."""
        found = [self._score(number, settings, concepts) for number in range(len(self._dictionaries))]
        for place, sample in self._samples.items():
            values = sample.separability(self._documents, settings)
            chance = float(sample.separability(self._documents, settings, shuffled=True).mean())
            found.append(Scores("raw", place, np.arange(values.size), values, chance))
        return sorted(found, key=lambda scores: (scores.place.order, scores.name == "raw"))

    def _score(self, number: int, settings: CalibrationSettings, concepts: Sequence[int]) -> Scores:
        own, drawn = self._own[number], self._drawn[number]
        own.settle()
        drawn.settle()
        choice = choose(own, self._documents, settings, concepts)
        chance = choose(drawn, self._documents, settings, ()).separability
        best = [
            next(blocks(own, self._documents, settings, np.array([found[0].feature]))) if found else None
            for found in choice.candidates
        ]
        return Scores(
            self._dictionaries[number].name,
            self._dictionaries[number].place,
            choice.alive,
            choice.separability,
            float(chance.mean()) if chance.size else 0.0,
            choice.never_fired,
            choice.candidates,
            tuple(best),
        )
