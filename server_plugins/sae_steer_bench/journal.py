"""The file of a running measurement: what is in it survives the process, and a later one goes on from there."""

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from filelock import FileLock, Timeout
from pydantic import ValidationError

from sae_steer_bench.errors import BenchError
from sae_steer_bench.records import LINE, Measurement, Plan, RoundEnd

NAME = "run.jsonl"


class Journal:
    """Appends records to ``run.jsonl`` in a folder, each on the disk before the next thing happens.

    Args:
        folder: Of the run.

    Raises:
        BenchError: Another process writes there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file: IO[bytes] | None = None
        self._lock = FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise BenchError(f"Another process measures into {folder}. Wait for it, or choose another --out.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def require_new(self) -> None:
        """Raises :class:`BenchError` where a run is there already."""
        if self._path.exists():
            raise BenchError(f"{self._path.parent} holds a run. Go on with --resume, or choose another --out.")

    def resume(self) -> tuple[Plan, list[Measurement]]:
        """The plan and the measurements of complete rounds; what lies behind them is taken out of the file."""
        plan, done, rounds = read(self._path.parent)
        fresh = self._path.with_suffix(".tmp")
        records: list[Plan | Measurement | RoundEnd] = [plan, *done, *(RoundEnd(round=number) for number in rounds)]
        with fresh.open("wb") as file:
            file.writelines(_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        return plan, done

    def append(self, record: Plan | Measurement | RoundEnd) -> None:
        """Writes a line, and returns once the disk has it."""
        if self._file is None:
            self._file = self._path.open("ab")
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())


def read(folder: Path) -> tuple[Plan, list[Measurement], list[int]]:
    """A run's plan, the measurements of its complete rounds, and the numbers of these.

    Raises:
        BenchError: There is no run, or something else stands in its file.
    """
    path = folder / NAME
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise BenchError(f"{folder} holds no run: {error.strerror or error} ({path}).") from None
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # a kill in the middle of a write
    try:
        records = [LINE.validate_json(line) for line in lines]
    except ValidationError as error:
        raise BenchError(f"{path} is not a run of this version: {error.errors()[0]['msg']}.") from None
    if not records or not isinstance(records[0], Plan):
        raise BenchError(f"{path} has no plan: the run was stopped before its first round. Begin anew.")
    rounds = [record.round for record in records if isinstance(record, RoundEnd)]
    whole = set(rounds)
    done = [record for record in records if isinstance(record, Measurement) and record.round in whole]
    return records[0], done, rounds


def _line(record: Plan | Measurement | RoundEnd) -> bytes:
    return record.model_dump_json().encode() + b"\n"
