"""features.json: labels and reference maxima beside the weights."""

import json
from pathlib import Path

import pytest

from sae_steer.errors import CheckpointError
from sae_steer.sae import FeatureLabel, Labels
from tests.sae_files import write_labels


def test_without_the_file_there_are_none(tmp_path: Path) -> None:
    labels = Labels.load(tmp_path)
    assert len(labels) == 0
    assert labels.get(0) is None
    assert labels.search("", 5) == []


def test_get_and_search(tmp_path: Path) -> None:
    write_labels(tmp_path, {30: ("Red FRUIT", 2.5), 4: ("fruit trees", None), 7: (None, 9), 9: ("Straße", 1.0)})
    labels = Labels.load(tmp_path, 31)
    assert labels.get(30) == FeatureLabel(30, "Red FRUIT", 2.5)
    assert labels.get(7) == FeatureLabel(7, None, 9.0)
    assert labels.get(5) is None
    assert [found.feature for found in labels.search("Fruit", 10)] == [4, 30]
    assert [found.feature for found in labels.search("STRASSE", 10)] == [9]
    assert [found.feature for found in labels.search("", 10)] == [4, 9, 30, 7]
    assert [found.feature for found in labels.search("", 2)] == [4, 9]
    assert labels.search("fruit", 0) == labels.search("fruit", -1) == []
    assert labels.search("None", 10) == labels.search("none", 10) == []


def test_one_of_both_is_enough(tmp_path: Path) -> None:
    features = {"1": {"label": "x"}, "2": {"reference_max": 3}, "3": {"more": [1]}}
    (tmp_path / "features.json").write_text(json.dumps({"features": features, "source": "somewhere"}))
    labels = Labels.load(tmp_path)
    assert [labels.get(i) for i in (1, 2, 3)] == [
        FeatureLabel(1, "x", None),
        FeatureLabel(2, None, 3.0),
        FeatureLabel(3, None, None),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "'features' must be an object"),
        ('{"features": [1]}', "'features' must be an object"),
        ('{"features": {"1": 3}}', "feature 1 must be an object"),
        ('{"features": {"10": {}}}', "'10' is not a feature of this SAE"),
        ('{"features": {"-1": {}}}', "'-1' is not a feature"),
        ('{"features": {"01": {}}}', "'01' is not a feature"),
        ('{"features": {"1.0": {}}}', "is not a feature"),
        ('{"features": {"²": {}}}', "is not a feature"),
        ('{"features": {"1": {"label": 3}}}', "label of feature 1"),
        ('{"features": {"1": {"label": "a\\nb"}}}', "plain text"),
        ('{"features": {"1": {"label": "\\u001b[2J"}}}', "plain text"),
        ('{"features": {"1": {"label": "\\u202eevil"}}}', "plain text"),
        ('{"features": {"1": {"label": "\\ud800"}}}', "plain text"),
        ('{"features": {"1": {"label": "%s"}}}' % ("x" * 2001), "at most 2000"),
        ('{"features": {"1": {"reference_max": 0}}}', "finite positive"),
        ('{"features": {"1": {"reference_max": -1.5}}}', "finite positive"),
        ('{"features": {"1": {"reference_max": NaN}}}', "finite positive"),
        ('{"features": {"1": {"reference_max": 1e999}}}', "finite positive"),
        ('{"features": {"1": {"reference_max": 1%s}}}' % ("0" * 400), "finite positive"),
        ('{"features": {"1": {"reference_max": true}}}', "finite positive"),
        ('{"features": {"1": {"reference_max": "3"}}}', "finite positive"),
    ],
)
def test_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "features.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as caught:
        Labels.load(tmp_path, 10)
    assert "features.json" in caught.value.message


@pytest.mark.parametrize("label", ["naïve café", "日本語 <b>&amp;</b>", "👩\u200d🔬", "\u00a0", "x" * 2000])
def test_any_line_of_text_is_a_label(tmp_path: Path, label: str) -> None:
    write_labels(tmp_path, {1: (label, None)})
    entry = Labels.load(tmp_path, 2).get(1)
    assert entry is not None
    assert entry.label == label


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_steer.sae.labels.MAX_LABELS_BYTES", 100)
    write_labels(tmp_path, dict.fromkeys(range(10), ("label", 1.0)))
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        Labels.load(tmp_path)
