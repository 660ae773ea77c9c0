"""Labelled text from a JSONL or CSV file, row by row: a file of any size is read in the memory of one line.

A file is surveyed once before any model runs: labels and texts are counted, and every row that cannot be used is named
by its line. What is read afterwards is known to be good.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sae_steer.errors import DataError

MAX_LINE = 2**24
MAX_LABELS = 4096
MAX_LABEL_CHARACTERS = 128
_SHOWN = 5  # faulty lines that a message names


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a row's text and labels are.

    Args:
        text: Column of the text.
        label: Column of the label; None = the file has one label, ``constant``.
        separator: What separates several labels of one row, such as ``|``; None = a row has one.
        names: Labels by the value that the file has for them, such as ``{"1": "toxic"}``; others are their own names.
        only: Columns and the value that a row must have there to be used, such as ``("split", "train")``.
        start: Column of the first character of the labelled span, from 0.
        end: Column of the character behind it.
        word: Column of the labelled word, which is sought in the text; instead of ``start`` and ``end``.
        constant: The label of every row, where ``label`` is None.
    """

    text: str = "text"
    label: str | None = "label"
    separator: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    only: tuple[tuple[str, str], ...] = ()
    start: str | None = None
    end: str | None = None
    word: str | None = None
    constant: str = ""

    @property
    def spans(self) -> bool:
        """Whether the rows say which part of the text is labelled."""
        return self.word is not None or (self.start is not None and self.end is not None)


class Text(NamedTuple):
    """A row: its line in the file, its text, its labels, and the labelled span in characters, where one is told."""

    line: int
    text: str
    labels: tuple[str, ...]
    span: tuple[int, int] | None


class Fault(NamedTuple):
    """A row that cannot be used, and why; ``unlabelled`` rows may be skipped."""

    line: int
    reason: str
    unlabelled: bool = False


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file holds.

    Args:
        texts: Rows that are used.
        labels: All labels, sorted.
        documents: Texts of each label, in that order; a text with two labels counts for both.
        skipped: Unlabelled rows.
        identity: Digest of the whole file and of its columns: another file has another.
    """

    texts: int
    labels: tuple[str, ...]
    documents: tuple[int, ...]
    skipped: int
    identity: str


class Reader:
    """The rows of a file from some place on; :attr:`offset` and :attr:`line` are where the next row starts.

    Args:
        path: A ``.jsonl`` (also ``.ndjson``), ``.csv`` or ``.tsv`` file, in UTF-8; ``.txt`` has one text a line.
        columns: Where texts and labels are.
        offset: Byte to start from; 0 = the beginning.
        line: Lines before it.
        digest: Fed with every line that is read, where it is given.

    Raises:
        DataError: The file cannot be opened, or its form is not known.
    """

    def __init__(
        self, path: Path, columns: Columns, offset: int = 0, line: int = 0, digest: "hashlib._Hash | None" = None
    ) -> None:
        self.path, self.columns = path, columns
        self.offset, self.line = offset, line
        self._digest = digest
        forms = {".jsonl": self._json, ".ndjson": self._json, ".txt": self._plain}
        tables = {".csv": ",", ".tsv": "\t"}
        suffix = path.suffix.lower()
        if suffix not in forms and suffix not in tables:
            raise DataError(f"{path}: a file of labelled text is .jsonl, .csv, .tsv or (one text a line) .txt.")
        self._delimiter = tables.get(suffix)
        self._form: Callable[[BinaryIO], Iterator[Text | Fault]] = forms.get(suffix, self._table)

    def __iter__(self) -> Iterator[Text | Fault]:
        try:
            with self.path.open("rb") as file:
                yield from self._form(file)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or type(error).__name__}.") from error

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        """The lines from the offset on, as text with their ends."""
        file.seek(self.offset)
        while data := file.readline(MAX_LINE + 1):
            if len(data) > MAX_LINE:
                raise DataError(f"{self.path}, line {self.line + 1}: longer than {MAX_LINE} bytes.")
            self.offset += len(data)
            self.line += 1
            if self._digest is not None:
                self._digest.update(data)
            try:
                yield data.decode("utf-8-sig" if self.line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{self.path}, line {self.line}: not UTF-8 ({error.reason}).") from None

    def _json(self, file: BinaryIO) -> Iterator[Text | Fault]:
        for text in self._lines(file):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = _cut_off(text) or f"not JSON ({str(error)[:80]})"
                yield Fault(self.line, reason)
                continue
            yield from self._row(row, self.line) if isinstance(row, dict) else [Fault(self.line, "not a JSON object")]

    def _plain(self, file: BinaryIO) -> Iterator[Text | Fault]:
        for text in self._lines(file):
            if text.strip():
                yield from self._row({self.columns.text: text.strip()}, self.line)

    def _table(self, file: BinaryIO) -> Iterator[Text | Fault]:
        csv.field_size_limit(MAX_LINE)
        start, before = self.offset, self.line
        self.offset = self.line = 0
        delimiter = self._delimiter or ","
        try:
            header = next(csv.reader(self._lines(file), delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            raise DataError(f"{self.path}, line 1: the header cannot be read ({error}).") from None
        self._check_header(header)
        if start:
            self.offset, self.line = start, before
        last = [""]

        def remembered() -> Iterator[str]:
            for text in self._lines(file):
                last[0] = text
                yield text

        rows = csv.reader(remembered(), delimiter=delimiter, strict=True)
        while True:
            first = self.line + 1
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                open_quote = "unexpected end of data" in str(error)
                yield Fault(first, _cut_off(last[0], open_quote=open_quote) or f"not CSV ({error})")
                return
            if not values:
                continue
            if len(values) != len(header):
                reason = _cut_off(last[0]) or f"{len(values)} columns, and the header has {len(header)}"
                yield Fault(first, reason)
                continue
            yield from self._row(dict(zip(header, values, strict=True)), first)

    def _check_header(self, header: list[str]) -> None:
        c = self.columns
        wanted = [c.text, c.label, c.start, c.end, c.word, *(name for name, _ in c.only)]
        twice = next((name for name in header if name in wanted and header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{self.path} has two columns {twice!r}.")
        missing = [name for name in wanted if name is not None and name not in header]
        if missing:
            raise DataError(
                f"{self.path} has no column {missing[0]!r}. Its columns: {', '.join(header) or 'none'}. Name them with "
                "--text-column and --label-column."
            )

    def _row(self, row: Mapping[str, Any], line: int) -> Iterator[Text | Fault]:
        c = self.columns
        if any(_written(row.get(name)) != value for name, value in c.only):
            return
        text = row.get(c.text)
        if not isinstance(text, str):
            yield Fault(line, f"no text in {c.text!r}")
            return
        labels = self._labels(row)
        if isinstance(labels, str):
            yield Fault(line, labels)
        elif not labels:
            yield Fault(line, "no label", unlabelled=True)
        elif not text.strip():
            yield Fault(line, "an empty text")
        elif not all(map(_encodes, (text, *labels))):
            yield Fault(line, "half of a surrogate pair, which is no character")
        else:
            span = self._span(row, text)
            yield Fault(line, span) if isinstance(span, str) else Text(line, text, labels, span)

    def _labels(self, row: Mapping[str, Any]) -> tuple[str, ...] | str:
        """The labels of a row, each once; or what is wrong with them."""
        c = self.columns
        if c.label is None:
            return (c.constant,)
        value = row.get(c.label)
        parts = value if isinstance(value, list) else [value]
        words = [_written(part) for part in parts]
        if any(word is None for word in words):
            return () if value is None else f"the label in {c.label!r} is no text, number or list of them"
        found = [
            part.strip() for word in words if word for part in (word.split(c.separator) if c.separator else [word])
        ]
        named = tuple(dict.fromkeys(c.names.get(part, part) for part in found if part))
        long = next((label for label in named if len(label) > MAX_LABEL_CHARACTERS), None)
        return named if long is None else f"a label of {len(long)} characters; {MAX_LABEL_CHARACTERS} are the most"

    def _span(self, row: Mapping[str, Any], text: str) -> tuple[int, int] | str | None:
        c = self.columns
        if not c.spans:
            return None
        if c.word is not None:
            word = row.get(c.word)
            if not isinstance(word, str) or not word:
                return f"no word in {c.word!r}"
            match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
            return (match.start(), match.end()) if match else f"the word {word[:40]!r} is not in the text"
        try:
            start, end = int(row[c.start or ""]), int(row[c.end or ""])
        except (KeyError, TypeError, ValueError, OverflowError):  # the last one: JSON as Python reads it has Infinity
            return f"no whole numbers in {c.start!r} and {c.end!r}"
        if not 0 <= start < end <= len(text):
            return f"the span {start} to {end} is not in a text of {len(text)} characters"
        return start, end


def survey(
    path: Path, columns: Columns, *, skip_unlabelled: bool = False, progress: Callable[[int], object] | None = None
) -> Survey:
    """Reads a whole file once and checks every row.

    Args:
        path: The file.
        columns: Where texts and labels are.
        skip_unlabelled: Whether rows without a label are counted and left out; otherwise they are refused.
        progress: Told how many bytes were read since it was last called.

    Raises:
        DataError: Rows cannot be used; the first of them are named by line. Or there is no row, or too many labels.
    """
    digest = hashlib.sha256(f"{columns}\n".encode())
    reader = Reader(path, columns, digest=digest)
    found: Counter[str] = Counter()
    texts = skipped = told = faults = 0
    first: list[Fault] = []
    for row in reader:
        if isinstance(row, Fault):
            if row.unlabelled and skip_unlabelled:
                skipped += 1
            else:
                faults += 1
                first += [row][: _SHOWN - len(first)]
            continue
        texts += 1
        found.update(row.labels)
        if len(found) > MAX_LABELS:
            raise DataError(f"{path}: more than {MAX_LABELS} labels by line {row.line}. Is this the column of labels?")
        if progress is not None and texts % 1000 == 0:
            progress(reader.offset - told)
            told = reader.offset
    if faults:
        raise _refusal(path, first, faults)
    if not texts:
        raise DataError(f"{path}: no row can be used. {skipped} rows have no label, and others may not meet --only.")
    labels = tuple(sorted(found))
    identity = f"sha256:{digest.hexdigest()}"
    return Survey(texts, labels, tuple(found[label] for label in labels), skipped, identity)


def first_texts(path: Path, columns: Columns, most: int | None) -> list[Text]:
    """The first ``most`` texts of a surveyed file, and no row behind them; None = all."""
    return list(islice((row for row in Reader(path, columns) if not isinstance(row, Fault)), most))


def _refusal(path: Path, first: list[Fault], faults: int) -> DataError:
    lines = "; ".join(f"line {fault.line}: {fault.reason}" for fault in first)
    more = f" and {faults - len(first)} more" if faults > len(first) else ""
    hint = " Pass --skip-unlabelled to leave rows without a label out." if any(f.unlabelled for f in first) else ""
    return DataError(f"{path} has rows that cannot be used: {lines}{more}.{hint}")


def _cut_off(last: str, *, open_quote: bool = False) -> str | None:
    """Whether a row that cannot be read is the end of a file that was cut off: no line end, or none of its quote."""
    if last.endswith("\n") and not open_quote:
        return None
    return "the file ends in the middle of this row; finish or remove it"


def _encodes(text: str) -> bool:
    """Whether UTF-8 has a form for a text: JSON may hold one half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _written(value: object) -> str | None:
    """A label or another value as text; None where it has no such form."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else None
