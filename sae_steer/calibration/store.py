"""Calibrations as a server holds them: read once for each content, the least used one forgotten first."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from sae_steer.calibration.info import CalibrationInfo
from sae_steer.calibration.record import CALIBRATION_FILE, Calibration
from sae_steer.errors import CheckpointError, SchemaError, UnknownName

_MOST = 16
"""Calibrations in memory: 64 bins of 4,096 features and 10 concepts are 10 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredCalibration:
    """A calibration that was read and found whole; one object for one content while it is held.

    Args:
        name: The profile that it was found by first.
        info: What it was made from.
        record: The numbers.
    """

    name: str
    info: CalibrationInfo
    record: Calibration

    def concept(self, concept: str, *, param: str) -> int:
        """The number of a concept among the labels; raises :class:`UnknownName` with the concepts there are."""
        if concept not in self.info.concepts:
            other = " It is a label, and no features were chosen for it." if concept in self.info.labels else ""
            raise UnknownName(
                f"{param}: calibration {self.name!r} has no concept {concept!r}.{other} "
                f"Concepts: {', '.join(self.info.concepts)}.",
                param=param,
                code="unknown_concept",
            )
        return self.info.labels.index(concept)


class CalibrationStore:
    """What was read, by content. Safe to use from several threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, StoredCalibration] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, folder: Path, info: CalibrationInfo) -> StoredCalibration:
        """The calibration in a profile's folder; raises :class:`SchemaError` for a file that is broken or another."""
        key = info.model_dump_json()
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        try:
            if not (folder / CALIBRATION_FILE).is_file():
                raise CheckpointError(f"{CALIBRATION_FILE} is not there.")
            record = Calibration.read(folder, info)
            if any(record.chosen(info.labels.index(concept)).numel() == 0 for concept in info.concepts):
                raise CheckpointError(f"{CALIBRATION_FILE} has no feature for a concept that profile.json names.")
        except CheckpointError as error:
            raise SchemaError(
                f"The stored profile {name!r} has a broken calibration: {error.message}", code="broken_profile"
            ) from None
        stored = StoredCalibration(name, info, record)
        with self._lock:
            stored = self._held.setdefault(key, stored)
            while len(self._held) > _MOST:
                self._held.popitem(last=False)
        return stored
