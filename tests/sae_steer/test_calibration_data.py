"""Labelled text: what is read, and what is refused by its line."""

import csv
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steer.calibration.data import Columns, Fault, Reader, Text, first_texts, survey
from sae_steer.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path, columns: Columns | None = None) -> list[Text | Fault]:
    return list(Reader(path, columns or Columns()))


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        {"text": "a", "label": "x"},
        {"text": "b", "label": ["x", "y", "x"]},
        {"text": "c", "label": True},
        {"text": "d", "label": 3},
    ]
    path = write(tmp_path / "d.jsonl", "\ufeff" + "\n".join(map(json.dumps, lines)) + "\n\n")
    assert rows(path) == [
        Text(1, "a", ("x",), None),
        Text(2, "b", ("x", "y"), None),
        Text(3, "c", ("true",), None),
        Text(4, "d", ("3",), None),
    ]
    found = survey(path, Columns())
    assert (found.texts, found.labels, found.documents) == (4, ("3", "true", "x", "y"), (1, 1, 2, 1))


def test_csv_with_its_options(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.csv",
        'split,body,kinds\ntrain,"two\nlines, and a ""quote""",a|b\ntest,other,a\ntrain,third,c\ntrain,fourth, b \n',
    )
    columns = Columns(text="body", label="kinds", separator="|", names={"c": "b"}, only=(("split", "train"),))
    assert rows(path, columns) == [
        Text(2, 'two\nlines, and a "quote"', ("a", "b"), None),
        Text(5, "third", ("b",), None),
        Text(6, "fourth", ("b",), None),
    ]


def test_spans(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "text,label,start,end\nthe bass swam,fish,4,8\nbass,fish,2,9\nbass,fish,x,4\n")
    good, far, none = rows(path, Columns(start="start", end="end"))
    assert good == Text(2, "the bass swam", ("fish",), (4, 8))
    assert isinstance(far, Fault)
    assert "not in a text of 4 characters" in far.reason
    assert isinstance(none, Fault)
    assert "no whole numbers" in none.reason
    path = write(tmp_path / "d.jsonl", '{"text": "bass", "label": "fish", "start": Infinity, "end": 4}\n')
    [endless] = rows(path, Columns(start="start", end="end"))
    assert isinstance(endless, Fault)
    assert "no whole numbers" in endless.reason
    path = write(tmp_path / "w.csv", "text,label,word\nBassoon and Bass play,m,bass\nviola,m,bass\n")
    found, missing = rows(path, Columns(word="word"))
    assert found == Text(2, "Bassoon and Bass play", ("m",), (12, 16))
    assert isinstance(missing, Fault)
    assert "not in the text" in missing.reason


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: no label.*--skip-unlabelled"),
        ("d.jsonl", '{"text": "a", "label": null}\n', "line 1: no label"),
        ("d.jsonl", '{"text": "a", "label": ""}\n', "line 1: no label"),
        (
            "d.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "la',
            "line 2: the file ends in the middle of this row",
        ),
        ("d.jsonl", '{"text": "a", "la\n{"text": "b", "label": "x"}\n', "line 1: not JSON"),
        ("d.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("d.jsonl", "[" * 100000 + "\n", "line 1: not JSON"),
        ("d.jsonl", '{"text": 5, "label": "x"}\n', "line 1: no text"),
        ("d.jsonl", '{"text": " ", "label": "x"}\n', "line 1: an empty text"),
        ("d.jsonl", '{"text": "a", "label": {"x": 1}}\n', "line 1: the label in 'label' is no text"),
        ("d.jsonl", '{"text": "a", "label": "%s"}\n' % ("x" * 200), "a label of 200 characters"),
        ("d.jsonl", "", "no row can be used"),
        ("d.jsonl", '{"text": "a\\ud800", "label": "x"}\n', "line 1: half of a surrogate pair"),
        ("d.jsonl", '{"text": "a", "label": "\\udfff"}\n', "line 1: half of a surrogate pair"),
        ("d.csv", "text,label\na,x\nb\n", "line 3: 1 columns, and the header has 2"),
        ("d.csv", "text,label\na,x\nb", "line 3: the file ends in the middle of this row"),
        ("d.csv", 'text,label\na,x\n"b and no', "line 3: the file ends in the middle of this row"),
        ("d.csv", 'text,label\n"a"b,x\nc,y\n', "line 2: not CSV"),
        ("d.csv", "body,label\na,x\n", "no column 'text'. Its columns: body, label"),
        ("d.csv", '"text,label', "line 1: the header cannot be read"),
        ("d.csv", "text,label,label\na,x,y\n", "two columns 'label'"),
        ("d.csv", "", "no column 'text'. Its columns: none"),
        ("d.csv", b"text,label\na\xff,x\n", "line 2: not UTF-8"),
        ("d.parquet", "", "is .jsonl, .csv, .tsv"),
        ("none.csv", None, "cannot be read: No such file"),
    ],
)
def test_refusals_name_the_line(tmp_path: Path, name: str, content: str | bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(DataError, match=says):
        survey(path, Columns())


def test_many_faults_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n' * 12)
    with pytest.raises(DataError, match="line 5: no label and 7 more"):
        survey(path, Columns())


def test_unlabelled_rows_may_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n{"text": "c", "label": []}\n')
    found = survey(path, Columns(), skip_unlabelled=True)
    assert (found.texts, found.skipped) == (1, 2)


def test_too_many_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "".join(f'{{"text": "a", "label": {i}}}\n' for i in range(4100)))
    with pytest.raises(DataError, match="more than 4096 labels by line 4097"):
        survey(path, Columns())


def test_another_file_has_another_identity(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a", "label": "x"}\n')
    before = survey(path, Columns()).identity
    assert survey(path, Columns()).identity == before
    assert survey(path, Columns(names={"x": "y"})).identity != before
    write(path, '{"text": "b", "label": "x"}\n')
    assert survey(path, Columns()).identity != before


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_a_label_in_the_middle_of_a_large_file_is_of_its_identity(tmp_path: Path, name: str) -> None:
    json_row = '{{"text": "{}", "label": "{}"}}\n'
    head, row = ("", json_row) if name == "d.jsonl" else ("text,label\n", "{},{}\n")
    lines = [row.format("word " * 200, "xy"[i % 2]) for i in range(4000)]
    path = write(tmp_path / name, head + "".join(lines))
    assert path.stat().st_size > 3 * 2**20
    before = survey(path, Columns())
    lines[2000], lines[2001] = lines[2001], lines[2000]  # of the same size, and with the same counts
    write(path, head + "".join(lines))
    after = survey(path, Columns())
    assert (after.texts, after.documents) == (before.texts, before.documents)
    assert after.identity != before.identity


def test_the_first_texts_are_all_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n{"text": "c", "label": "y"}\n')
    assert [text.text for text in first_texts(path, Columns(), None)] == ["a", "c"]
    assert [text.text for text in first_texts(path, Columns(), 2)] == ["a", "c"]
    write(path, path.read_bytes() + b"\xff\n")
    assert [text.text for text in first_texts(path, Columns(), 2)] == ["a", "c"], "the last line is not looked at"


def test_a_large_file_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for i in range(40_000):
            file.write(f'"{"word " * 100}{i}",{i % 3}\n')
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert survey(path, Columns()).texts == 40_000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=12)


@given(st.data())
def test_reading_goes_on_from_any_row(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    texts = data.draw(st.lists(TEXTS, min_size=1, max_size=8))
    path = tmp_path_factory.mktemp("d") / data.draw(st.sampled_from(["d.csv", "d.jsonl"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
            writer.writerows([["text", "label"], *([text, "x"] for text in texts)])
        else:
            file.writelines(json.dumps({"text": text, "label": "x"}) + "\n" for text in texts)
    reader = Reader(path, Columns())
    found, places = [], []
    for row in reader:
        found.append(row)
        places.append((reader.offset, reader.line))
    assert [row.text if isinstance(row, Text) else "" for row in found] == [t if t.strip() else "" for t in texts]
    cut = data.draw(st.integers(0, len(found) - 1))
    assert list(Reader(path, Columns(), *places[cut])) == found[cut + 1 :]
