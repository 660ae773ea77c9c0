"""Labels that are given beside a checkpoint: Neuronpedia's exports of explanations, and a CSV.

* ``.json``: a list of explanations, or an object that has it as ``explanations``; or the form of ``features.json``.
* ``.jsonl`` and ``.jsonl.gz``: an explanation a line, as in the batches of Neuronpedia's public datasets; a folder of
  such files is read in the order of their names.
* ``.csv``: a head line ``feature,label`` or ``feature,label,reference_max``, and a feature a line.

Of an explanation, ``index`` and ``description`` are read; ``modelId`` and ``layer`` must be the same throughout. That a
feature has several explanations is usual there: the first counts.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn, Protocol

from sae_steer.errors import CheckpointError, StartError
from sae_steer.sae.labels import MAX_LABEL_CHARACTERS, MAX_LABELS_BYTES, FeatureLabel, Labels, is_plain, made_plain

MAX_LINE_BYTES = 2**20
MAX_STREAM_BYTES = 4 * 2**30
"""Of all lines together, uncompressed: batches carry an embedding beside each explanation, which is not kept."""


_BATCHES = (".jsonl", ".jsonl.gz")
_COLUMNS = ("feature", "label", "reference_max")


class _Lines(Protocol):
    def readline(self, size: int, /) -> bytes: ...


def read_labels(path: Path, n_features: int) -> Labels:
    """Reads labels of an SAE.

    Args:
        path: A file, or a folder of batches.
        n_features: F, to check the numbers against.

    Raises:
        StartError: Something in it is not of the forms above; the message has the file and the line or entry.
    """
    try:
        return _read(path, n_features)
    except OSError as error:
        raise StartError(f"The labels {path} cannot be read: {error.strerror or error}.") from None


def _read(path: Path, n_features: int) -> Labels:
    if path.is_dir():
        batches = sorted(file for file in path.iterdir() if file.name.endswith(_BATCHES))
        if not batches:
            raise StartError(f"The folder of labels {path} has no {' or '.join(_BATCHES)} in it.")
        return _explained(_batches(batches), n_features)
    if path.name.endswith(_BATCHES):
        return _explained(_batches([path]), n_features)
    if path.suffix == ".json":
        return _document(path, n_features)
    if path.suffix == ".csv":
        return _table(path, n_features)
    raise StartError(f"The labels {path} are of no known kind. Known are .csv, .json, {' and '.join(_BATCHES)}.")


def _document(path: Path, n_features: int) -> Labels:
    with path.open("rb") as file:
        content = file.read(MAX_LABELS_BYTES + 1)
    if len(content) > MAX_LABELS_BYTES:
        raise StartError(f"{path} is larger than {MAX_LABELS_BYTES} bytes, the most that is read. Make it a .jsonl.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StartError(f"{path} is not readable JSON: {error}.") from None
    if isinstance(value, dict) and "features" in value:
        try:
            return Labels.parse(value, path, n_features)
        except CheckpointError as error:
            raise StartError(error.message) from None
    entries = value.get("explanations") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise StartError(f"{path} holds no list of explanations, and no object with 'explanations' or 'features'.")
    return _explained(((f"{path}, entry {i}", entry) for i, entry in enumerate(entries)), n_features)


def _batches(paths: Iterable[Path]) -> Iterator[tuple[str, object]]:
    left = MAX_STREAM_BYTES
    for path in paths:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(_lines(file, path), 1):
                where = f"{path}, line {number}"
                left -= len(line)
                if left < 0:
                    _refuse(where, f"labels of more than {MAX_STREAM_BYTES} bytes are not read")
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError) as error:
                    _refuse(where, f"not readable JSON: {error}")


def _lines(file: _Lines, path: Path) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            _refuse(f"{path}, line {number}", f"the compressed data is damaged: {error}")
        if len(line) > MAX_LINE_BYTES:
            _refuse(f"{path}, line {number}", f"longer than {MAX_LINE_BYTES} bytes")
        if not line:
            return
        yield line


def _explained(entries: Iterable[tuple[str, object]], n_features: int) -> Labels:
    found: dict[int, FeatureLabel] = {}
    source: tuple[object, object] | None = None
    for where, entry in entries:
        if not isinstance(entry, Mapping) or "index" not in entry or "description" not in entry:
            _refuse(where, "needed is an object with 'index' and 'description'")
        this = entry.get("modelId"), entry.get("layer")
        source = source or this
        if this != source:
            _refuse(where, f"this explains {this[0]}/{this[1]}, and what came before it {source[0]}/{source[1]}")
        feature = _feature(str(entry["index"]), n_features, where)
        text = entry["description"]
        if text is None or feature in found:
            continue
        if not isinstance(text, str):
            _refuse(where, "the description is no text")
        label = made_plain(text)
        if len(label) > MAX_LABEL_CHARACTERS:
            _refuse(where, f"the description is longer than {MAX_LABEL_CHARACTERS} characters")
        if label:
            found[feature] = FeatureLabel(feature, label, None)
    return Labels(found)


def _table(path: Path, n_features: int) -> Labels:
    found: dict[int, FeatureLabel] = {}
    with path.open("rb") as file:
        rows = csv.reader(_decoded(file, path), strict=True)
        where = f"{path}, line 1"
        try:
            head = tuple(next(rows, ()))
            if head not in (_COLUMNS[:2], _COLUMNS):
                _refuse(where, f"the head line must be {','.join(_COLUMNS[:2])} or {','.join(_COLUMNS)}")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if not row:
                    continue
                if len(row) != len(head):
                    _refuse(where, f"{len(row)} fields, and the head line has {len(head)}")
                entry = _row(row, n_features, where)
                if entry.feature in found:
                    _refuse(where, f"feature {entry.feature} is here for the second time")
                found[entry.feature] = entry
        except csv.Error as error:
            _refuse(f"{path}, line {rows.line_num}", str(error))
    return Labels(found)


def _decoded(file: _Lines, path: Path) -> Iterator[str]:
    left = MAX_LABELS_BYTES
    for number, line in enumerate(_lines(file, path), 1):
        left -= len(line)
        if left < 0:
            _refuse(f"{path}, line {number}", f"a table of more than {MAX_LABELS_BYTES} bytes is not read")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            _refuse(f"{path}, line {number}", "this is not UTF-8")


def _row(row: list[str], n_features: int, where: str) -> FeatureLabel:
    label, maximum = row[1].strip(), row[2].strip() if len(row) > 2 else ""
    if not is_plain(label):
        _refuse(where, f"a label is one line of plain text of at most {MAX_LABEL_CHARACTERS} characters")
    try:
        value = float(maximum) if maximum else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 < value < float("inf"):
        _refuse(where, f"reference_max {maximum[:40]!r} is no finite positive number")
    return FeatureLabel(_feature(row[0].strip(), n_features, where), label or None, value)


def _feature(text: str, n_features: int, where: str) -> int:
    # isascii first: other digits are digits to Python, too
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < n_features):
        _refuse(where, f"{text[:40]!r} is no feature of this SAE, which has 0 to {n_features - 1}")
    return int(text)


def _refuse(where: str, why: str) -> NoReturn:
    raise StartError(f"{where}: {why}.")
