"""Labels that are given at start: Neuronpedia's exports and a CSV, bounded, and refused with the line at fault."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import StartError
from sae_steer.sae import FeatureLabel, Labels, open_sae
from sae_steer.sae import label_files as label_files_module
from sae_steer.sae.label_files import read_labels
from tests.sae_files import write_labels, write_saelens

Json = dict[str, Any]


def explained(index: object, description: object, **more: object) -> Json:
    """An explanation with the fields of Neuronpedia's exports."""
    return {
        "modelId": "gemma-2-2b",
        "layer": "12-gemmascope-res-16k",
        "index": index,
        "description": description,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        "embedding": [0.25] * 4,
        **more,
    }


def lines(entries: Iterable[object]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


SOME = [
    explained("3", " the  sea\nand ships "),
    explained("0", "commas"),
    explained("3", "boats"),
    explained("9", None),
]
FOUND = {0: "commas", 3: "the sea and ships"}


def labels_of(labels: Labels) -> dict[int, str | None]:
    return {entry.feature: entry.label for entry in labels.search("", 1000)}


@pytest.mark.parametrize("name", ["a.json", "b.json", "c.jsonl", "d.jsonl.gz", "batches"])
def test_neuronpedias_forms(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    match name:
        case "a.json":
            path.write_text(json.dumps(SOME))
        case "b.json":
            path.write_text(json.dumps({"explanationsCount": 4, "explanations": SOME}))
        case "c.jsonl":
            path.write_bytes(lines(SOME) + b"\n")
        case "d.jsonl.gz":
            path.write_bytes(gzip.compress(lines(SOME)))
        case _:
            path.mkdir()
            (path / "batch-0.jsonl.gz").write_bytes(gzip.compress(lines(SOME[:1])))
            (path / "batch-1.jsonl").write_bytes(lines(SOME[1:]))
            (path / "README.md").write_text("not a batch")
    assert labels_of(read_labels(path, 10)) == FOUND


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes('\ufefffeature,label,reference_max\r\n3,"the sea, ""blue""",2.5\r\n\r\n0,,7\n9,tidy,\n'.encode())
    labels = read_labels(path, 10)
    assert [labels.get(i) for i in (0, 3, 9)] == [
        FeatureLabel(0, None, 7.0),
        FeatureLabel(3, 'the sea, "blue"', 2.5),
        FeatureLabel(9, "tidy", None),
    ]
    path.write_text("feature,label\n1,one\n")
    assert labels_of(read_labels(path, 10)) == {1: "one"}


def test_our_own_form(tmp_path: Path) -> None:
    write_labels(tmp_path, {4: ("four", 2.0)})
    assert read_labels(tmp_path / "features.json", 10).get(4) == FeatureLabel(4, "four", 2.0)


def test_what_would_not_show_is_replaced_in_an_export(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines([explained(1, "a\u202eb\x1b[2J"), explained(2, "<img src=x onerror=alert(1)>")]))
    assert labels_of(read_labels(path, 10)) == {1: "a\ufffdb\ufffd[2J", 2: "<img src=x onerror=alert(1)>"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[1", "not readable JSON: .*line 1"),
        ("x.json", b"[" * 100_000, "not readable JSON"),
        ("x.json", b"{}", "holds no list of explanations"),
        ("x.json", b"3", "holds no list of explanations"),
        ("x.json", b'[{"index": "1", "description": "a"}, 3]', r"entry 1: needed is an object"),
        ("x.json", b'{"features": {"10": {}}}', "'10' is not a feature"),
        ("x.jsonl", lines(SOME) + b"{", "line 5: not readable JSON"),
        ("x.jsonl", lines([SOME[0], {"index": "1"}]), "line 2: needed is an object"),
        ("x.jsonl", lines([SOME[0], explained("1", "a", layer="13-res")]), "line 2: this explains gemma-2-2b/13-res"),
        ("x.jsonl", lines([SOME[0], explained("10", "a")]), "line 2: '10' is no feature of this SAE, which has 0 to 9"),
        ("x.jsonl", lines([explained("-1", "a")]), "line 1: '-1' is no feature"),
        ("x.jsonl", lines([explained("²", "a")]), "line 1: '²' is no feature"),
        ("x.jsonl", lines([explained(1.5, "a")]), "line 1: '1.5' is no feature"),
        ("x.jsonl", lines([explained(1, ["a"])]), "line 1: the description is no text"),
        ("x.jsonl", lines([explained(1, "a" * 2001)]), "line 1: the description is longer than 2000"),
        ("x.jsonl", b"\xff\n", "line 1: not readable JSON"),
        ("x.jsonl", b" " * (2**20 + 1), "line 1: longer than 1048576 bytes"),
        ("x.jsonl.gz", lines(SOME), "line 1: the compressed data is damaged"),
        ("x.jsonl.gz", gzip.compress(lines(SOME))[:-9], "the compressed data is damaged"),
        ("x.csv", b"", "line 1: the head line must be feature,label"),
        ("x.csv", b"id,label\n", "line 1: the head line must be feature,label"),
        ("x.csv", b"feature,label\n1,a\n2\n", "line 3: 1 fields, and the head line has 2"),
        ("x.csv", b"feature,label\n1,a\n1,b\n", "line 3: feature 1 is here for the second time"),
        ("x.csv", b"feature,label\n10,a\n", "line 2: '10' is no feature"),
        ("x.csv", b'feature,label\n1,"a\nb"\n', "line 3: a label is one line"),
        ("x.csv", b"feature,label\n1,a\x1b[2J\n", "line 2: a label is one line"),
        ("x.csv", b'feature,label\n1,"a"b\n', "line 2: "),
        ("x.csv", b"feature,label\n1,\xff\n", "line 2: this is not UTF-8"),
        ("x.csv", b"feature,label,reference_max\n1,a,-1\n", "line 2: reference_max '-1'"),
        ("x.csv", b"feature,label,reference_max\n1,a,nan\n", "line 2: reference_max 'nan'"),
        ("x.csv", b"feature,label,reference_max\n1,a,1e999\n", "line 2: reference_max '1e999'"),
        ("x.csv", b"feature,label,reference_max\n1,a,big\n", "line 2: reference_max 'big'"),
        ("x.txt", b"", "of no known kind"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartError, match=message) as caught:
        read_labels(tmp_path / name, 10)
    assert name in caught.value.message


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        read_labels(tmp_path / "none.csv", 10)
    with pytest.raises(StartError, match=r"has no \.jsonl"):
        read_labels(tmp_path, 10)


@pytest.mark.parametrize(
    ("name", "limit", "content"),
    [
        ("x.json", "MAX_LABELS_BYTES", json.dumps(SOME).encode()),
        ("x.jsonl", "MAX_STREAM_BYTES", lines(SOME)),
        ("x.jsonl.gz", "MAX_STREAM_BYTES", gzip.compress(lines(SOME * 1000))),  # small on disk, large in memory
        ("x.csv", "MAX_LABELS_BYTES", b"feature,label\n" + b"1,a" * 200),
    ],
)
def test_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: str, content: bytes) -> None:
    monkeypatch.setattr(label_files_module, limit, 300)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartError, match="300 bytes"):
        read_labels(tmp_path / name, 10)


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".json", ".jsonl", ".jsonl.gz", ".csv"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and content[:1] > b"\x80" else content)
    try:
        labels = read_labels(path, 10)
    except StartError:
        return
    assert all(0 <= feature < 10 for feature in labels_of(labels))


def test_given_labels_go_over_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_saelens(tmp_path / "sae", architecture="standard", d_in=4, n_features=8, hook_name="blocks.0.hook_resid_post")
    write_labels(tmp_path / "sae", {1: ("one", 2.0), 2: ("two", 3.0)})
    (tmp_path / "more.csv").write_text("feature,label,reference_max\n1,uno,\n2,,4\n3,tres,\n")
    labels = CatalogSae.make("s", open_sae(tmp_path / "sae"), labels=tmp_path / "more.csv").labels
    assert labels is not None
    assert [labels.get(i) for i in (1, 2, 3)] == [
        FeatureLabel(1, "uno", 2.0),
        FeatureLabel(2, "two", 4.0),
        FeatureLabel(3, "tres", None),
    ]
    (tmp_path / "wide.csv").write_text("feature,label\n8,too far\n")
    with pytest.raises(StartError, match="line 2: '8' is no feature"):
        CatalogSae.make("s", open_sae(tmp_path / "sae"), labels=tmp_path / "wide.csv")


RANKED = {
    7: ("sea", None),
    6: ("Sea shells", None),
    5: ("seaside towns", None),
    4: ("the open sea", None),
    3: ("research", None),
    2: ("shells of the sea", None),
    1: ("nutshells, overseas", None),
    0: ("ships", None),
}


def test_the_best_label_comes_first(tmp_path: Path) -> None:
    write_labels(tmp_path, RANKED)
    labels = Labels.load(tmp_path)

    def found(query: str) -> list[int]:
        return [entry.feature for entry in labels.search(query, 10)]

    # the label itself; at its beginning, as a word and as part of one; at the start of a word; anywhere
    assert found("SEA") == [7, 6, 5, 4, 2, 3, 1], "of equal rank, the shorter first"
    assert found("sea  shells") == [6, 2, 1], "words apart count less, and parts of words least"
    assert found("sea (") == found("(") == found(".*") == []


def test_several_saes_are_ranked_together_and_a_number_finds_a_feature(tmp_path: Path) -> None:
    entries = []
    for name, own in (("a", {2: ("overseas", None), 3: ("51 ships", None)}), ("b", {5: ("sea", None)})):
        folder = tmp_path / name
        write_saelens(folder, architecture="standard", d_in=4, n_features=8, hook_name="blocks.0.hook_resid_post")
        write_labels(folder, own)
        entries.append(CatalogSae.make(name, open_sae(folder)))
    catalog = Catalog(entries)
    assert [(sae, entry.feature) for sae, entry in catalog.search_features(None, "sea", 10)] == [("b", 5), ("a", 2)]
    assert catalog.search_features("b", "#3", 10) == [("b", FeatureLabel(3, None, None))]
    found = catalog.search_features("a", " 3 ", 10)
    assert found == [("a", FeatureLabel(3, "51 ships", None))]
    assert catalog.search_features("a", "8", 10) == []
    assert [entry.feature for _, entry in catalog.search_features(None, "51", 10)] == [3]
