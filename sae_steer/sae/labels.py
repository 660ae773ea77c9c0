"""Labels and reference maxima of features: an optional ``features.json`` in the folder of a checkpoint.

Where the checkpoint is one file among others, such as ``layer0.pt``, it is ``layer0.features.json`` beside it.

``{"features": {"<id>": {"label": "text" or null, "reference_max": number}}}``; other keys are ignored.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sae_steer.errors import CheckpointError
from sae_steer.sae.files import read_json

LABELS_FILE = "features.json"
MAX_LABELS_BYTES = 64 * 2**20
MAX_LABEL_CHARACTERS = 2000
# Labels are shown in terminals and pages: no escapes, line breaks, direction marks or halves of characters.
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ID = re.compile(r"0|[1-9][0-9]{0,17}")  # one spelling for each number, within int64


@dataclass(frozen=True, slots=True)
class FeatureLabel:
    """What is known about one feature.

    Args:
        feature: Its number.
        label: Plain text; None = it has no label.
        reference_max: Largest activation seen, in the file's own units; None = not recorded.
    """

    feature: int
    label: str | None
    reference_max: float | None


class Labels:
    """What is known about the features of one SAE.

    Args:
        features: By number.
    """

    def __init__(self, features: Mapping[int, FeatureLabel]) -> None:
        self._features = dict(sorted(features.items()))
        self._folded = {i: entry.label.casefold() for i, entry in self._features.items() if entry.label is not None}

    @classmethod
    def load(cls, location: Path, n_features: int | None = None) -> Self:
        """Reads the labels of a checkpoint; without such a file there are none.

        Args:
            location: Folder of the checkpoint, or its one file.
            n_features: F, to check the numbers against.

        Raises:
            CheckpointError: The file does not have the form above.
        """
        path = labels_file(location)
        if not path.is_file():
            return cls({})
        return cls.parse(read_json(path, MAX_LABELS_BYTES), path, n_features)

    @classmethod
    def parse(cls, value: Mapping[str, object], path: Path, n_features: int | None = None) -> Self:
        """The same from what was read of ``path``."""
        features = value.get("features")
        if not isinstance(features, dict):
            raise CheckpointError(f"{path}: 'features' must be an object of features by number.")
        entries = (_entry(key, entry, n_features, path) for key, entry in features.items())
        return cls({entry.feature: entry for entry in entries})

    def get(self, feature: int) -> FeatureLabel | None:
        """What is known about a feature; None = nothing."""
        return self._features.get(feature)

    def updated(self, given: "Labels") -> "Labels":
        """These, with what is ``given`` for a feature in the place of what was known; a null says nothing."""
        merged = dict(self._features)
        for feature, new in given._features.items():
            old = merged.get(feature, new)
            label = new.label if new.label is not None else old.label
            maximum = new.reference_max if new.reference_max is not None else old.reference_max
            merged[feature] = FeatureLabel(feature, label, maximum)
        return Labels(merged)

    def search(self, query: str, limit: int) -> list[FeatureLabel]:
        """The ``limit`` best features of :meth:`ranked`."""
        found = list(self.ranked(query))
        if query.strip():
            found.sort(key=by_rank)
        return [entry for _, entry in found[: max(limit, 0)]]

    def ranked(self, query: str) -> Iterator[tuple[int, FeatureLabel]]:
        """The features whose label contains every word of ``query`` in any case, each with its rank, 0 = best.

        A label that is the query comes before one that begins with it, then one that has it at the start of a word,
        then anywhere, then one that has its words apart. An empty query finds every feature, those with a label first.
        """
        words = query.casefold().split()
        if not words:
            yield from ((0, entry) for entry in self._features.values() if entry.label is not None)
            yield from ((1, entry) for entry in self._features.values() if entry.label is None)
            return
        phrase = " ".join(words)
        start = re.compile(rf"(?<!\w){re.escape(phrase)}")
        starts = [re.compile(rf"(?<!\w){re.escape(word)}") for word in words]
        for feature, label in self._folded.items():
            if all(word in label for word in words):
                yield _rank(label, phrase, start, starts), self._features[feature]

    def __len__(self) -> int:
        return len(self._features)


def _rank(label: str, phrase: str, start: re.Pattern[str], starts: list[re.Pattern[str]]) -> int:
    if label == phrase:
        return 0
    if label.startswith(phrase):
        return 1 if not label[len(phrase)].isalnum() else 2
    if phrase in label:
        return 3 if start.search(label) else 4
    return 5 if all(word.search(label) for word in starts) else 6


def by_rank(found: tuple[int, FeatureLabel]) -> tuple[int, int, int]:
    """A sorting key of what :meth:`Labels.ranked` gives: of equal rank, the shorter label, then the lower number."""
    rank, entry = found
    return rank, len(entry.label or ""), entry.feature


def labels_file(location: Path) -> Path:
    """Where the labels of a checkpoint, a folder or one file, would be."""
    return location / LABELS_FILE if location.is_dir() else location.with_suffix(f".{LABELS_FILE}")


def _entry(key: str, value: object, n_features: int | None, path: Path) -> FeatureLabel:
    if not _ID.fullmatch(key) or (n_features is not None and int(key) >= n_features):
        raise CheckpointError(f'{path}: {key[:40]!r} is not a feature of this SAE. Write its number, such as "12".')
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: feature {key} must be an object with 'label' and 'reference_max'.")
    return FeatureLabel(
        int(key), _label(key, value.get("label"), path), _maximum(key, value.get("reference_max"), path)
    )


def is_plain(label: str) -> bool:
    """Whether a text may be a label as it stands: one line, not too long, of nothing but characters that show."""
    return len(label) <= MAX_LABEL_CHARACTERS and not _NOT_PLAIN.search(label)


def made_plain(text: str) -> str:
    """A text on one line, with a replacement character for each that would not show."""
    return _NOT_PLAIN.sub("\ufffd", " ".join(text.split()))


def _label(key: str, label: object, path: Path) -> str | None:
    if label is None:
        return None
    if not isinstance(label, str) or not is_plain(label):
        raise CheckpointError(
            f"{path}: the label of feature {key} must be null or one line of plain text of at most "
            f"{MAX_LABEL_CHARACTERS} characters."
        )
    return label


def _maximum(key: str, value: object, path: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{path}: 'reference_max' of feature {key} must be a finite positive number or null.")
    return float(value)
