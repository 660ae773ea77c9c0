"""Labels and reference maxima of features: an optional ``features.json`` in the folder of a checkpoint.

Where the checkpoint is one file among others, such as ``layer0.pt``, it is ``layer0.features.json`` beside it.

``{"features": {"<id>": {"label": "text" or null, "reference_max": number}}}``; other keys are ignored.
"""

import re
import sys
from collections.abc import Mapping
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
        features = read_json(path, MAX_LABELS_BYTES).get("features")
        if not isinstance(features, dict):
            raise CheckpointError(f"{path}: 'features' must be an object of features by number.")
        entries = (_entry(key, value, n_features, path) for key, value in features.items())
        return cls({entry.feature: entry for entry in entries})

    def get(self, feature: int) -> FeatureLabel | None:
        """What is known about a feature; None = nothing."""
        return self._features.get(feature)

    def search(self, query: str, limit: int) -> list[FeatureLabel]:
        """The first ``limit`` features whose label contains ``query`` in any case; empty: any feature.

        Labels that are the query come first, then those that begin with it; within these, by number.
        """
        folded = query.casefold()
        if not folded:
            return list(self._features.values())[: max(limit, 0)]
        found = [
            (label != folded, not label.startswith(folded), i) for i, label in self._folded.items() if folded in label
        ]
        return [self._features[i] for *_, i in sorted(found)[: max(limit, 0)]]

    def __len__(self) -> int:
        return len(self._features)


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


def _label(key: str, label: object, path: Path) -> str | None:
    if label is None:
        return None
    if not isinstance(label, str) or len(label) > MAX_LABEL_CHARACTERS or _NOT_PLAIN.search(label):
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
