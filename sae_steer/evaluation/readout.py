"""What reads the concept from the model: fixed before anything is edited, and the same for every method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sae_steer.errors import DataError

Floats = NDArray[np.float64]
Pool = Literal["mean", "last"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model made of texts.

    Args:
        pooled: ``[n, D]`` final hidden state, mean over tokens or at the last one.
        words: ``[n, C]`` probability of each label's word as the next token; None where no words are told.
    """

    pooled: Floats
    words: Floats | None


class Readout(Protocol):
    """From what was seen to labels."""

    def probabilities(self, seen: Seen) -> Floats:
        """``[n, C]`` of each label."""
        ...


@dataclass(frozen=True, slots=True)
class Probe:
    """A logistic regression on final hidden states of unedited runs.

    Args:
        model: scikit-learn's, behind a scaler.
    """

    model: Any

    @classmethod
    def fit(cls, pooled: Floats, labels: Sequence[int], *, count: int, seed: int) -> "Probe":
        """Fits on texts drawn with replacement, so that probes of different seeds differ as other samples would.

        Args:
            pooled: ``[n, D]``.
            labels: Their labels, each below ``count``.
            count: ``C``.
            seed: Of the draw.

        Raises:
            DataError: A label has no text.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        truth = np.asarray(labels)
        missing = sorted(set(range(count)) - set(truth.tolist()))
        if missing:
            raise DataError(f"No training text has label number {missing[0]}; the readout needs some of each.")
        generator = np.random.default_rng(seed)
        # By label, so that none is lost in a draw.
        rows = np.concatenate([generator.choice(np.flatnonzero(truth == c), (truth == c).sum()) for c in range(count)])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
        return cls(model.fit(pooled[rows], truth[rows]))

    def probabilities(self, seen: Seen) -> Floats:
        """``[n, C]``."""
        return np.asarray(self.model.predict_proba(seen.pooled), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Words:
    """The model's own answer: the probability of each label's word as the next token."""

    def probabilities(self, seen: Seen) -> Floats:
        """``[n, C]``; they need not sum to one."""
        assert seen.words is not None  # asked for together with the words
        return seen.words
