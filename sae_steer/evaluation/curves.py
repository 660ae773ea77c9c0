"""What each method costs at the same removal: points on its curve, samples of texts, and lines between points."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from sae_steer.evaluation.measure import Measured
from sae_steer.evaluation.methods import Method
from sae_steer.evaluation.readout import Floats


@dataclass(frozen=True, slots=True)
class Sample:
    """Which texts count, and by which readout: numbers of texts with repetition."""

    readout: int | None
    target: NDArray[np.int64]
    complement: NDArray[np.int64]
    plain: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Summary:
    """The measures of one request over a sample of texts.

    Args:
        target_accuracy: Share of the concept's texts whose likeliest label is the concept.
        target_confidence: Mean probability of the concept on them.
        complement_accuracy: The same of the other texts and their own labels.
        complement_confidence: Likewise.
        perplexity: On plain text.
        divergence: KL(unsteered || steered) of next-token distributions on the other labels' texts, nats a token.
    """

    target_accuracy: float
    target_confidence: float
    complement_accuracy: float
    complement_confidence: float
    perplexity: float
    divergence: float

    def vector(self) -> Floats:
        """The measures, in their order."""
        return np.array([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def of_vector(cls, values: Floats) -> "Summary":
        """Back from :meth:`vector`."""
        return cls(*values.tolist())


MEASURES = tuple(field.name for field in fields(Summary))


def whole(measured: Measured) -> Sample:
    """Every text once, and the mean of all readouts."""
    sizes = measured.target.shape[1], measured.complement.shape[1], measured.loss.size
    return Sample(None, *(np.arange(size) for size in sizes))


def samples(measured: Measured, count: int, seed: int = 0) -> Iterator[Sample]:
    """Samples for a percentile bootstrap: texts drawn with replacement, and the readouts in turn."""
    generator = np.random.default_rng(seed)
    readouts = measured.target.shape[0]
    sizes = measured.target.shape[1], measured.complement.shape[1], measured.loss.size
    for number in range(count):
        yield Sample(number % readouts, *(generator.integers(size, size=size) for size in sizes))


def summary(measured: Measured, sample: Sample) -> Summary:
    """The measures over a sample."""
    rows = slice(None) if sample.readout is None else slice(sample.readout, sample.readout + 1)

    def mean(values: Floats, texts: NDArray[np.int64]) -> float:
        return float(values[rows][:, texts].mean())

    loss = measured.loss[sample.plain].sum() / measured.loss_tokens[sample.plain].sum()
    divergence = measured.divergence[sample.complement].sum() / measured.divergence_tokens[sample.complement].sum()
    return Summary(
        target_accuracy=mean(measured.target_right, sample.target),
        target_confidence=mean(measured.target, sample.target),
        complement_accuracy=mean(measured.complement_right, sample.complement),
        complement_confidence=mean(measured.complement, sample.complement),
        perplexity=float(np.exp(loss)),
        divergence=float(divergence),
    )


@dataclass(frozen=True, slots=True)
class Reached:
    """A method at a given removal.

    Args:
        setting: Of its knob, on the line between two that were measured.
        summary: The measures there, likewise.
    """

    setting: float
    summary: Summary


def at_drop(method: Method, points: Mapping[float, Summary], plain: Summary, drop: float) -> Reached | None:
    """A method where it lowers the concept's confidence by ``drop``; None where it does not get there.

    The mildest place counts: from no edit at all, along the settings that were measured, to the first that is strong
    enough; between two of them on a straight line.

    Args:
        method: The method.
        points: The measures at the settings of its knob that were tried.
        plain: The measures without any edit, over the same texts.
        drop: Wanted fall of the confidence.
    """
    before, before_setting = plain, method.off
    for setting in sorted(points, key=method.place):
        here = points[setting]
        if plain.target_confidence - here.target_confidence >= drop:
            way = before.target_confidence - here.target_confidence
            left = before.target_confidence - (plain.target_confidence - drop)
            share = min(max(left / way, 0.0), 1.0) if way > 0 else 1.0
            vector = before.vector() + share * (here.vector() - before.vector())
            return Reached(before_setting + share * (setting - before_setting), Summary.of_vector(vector))
        before, before_setting = here, setting
    return None


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The central part of a bootstrap distribution, without what is not a number; None where nothing is left."""
    kept = np.asarray([value for value in values if not np.isnan(value)])
    if not kept.size:
        return None
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
