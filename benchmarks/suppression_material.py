"""The material of benchmarks/suppression.sh: labelled texts, divided once; plain text; a model; an SAE trained on it.

    python benchmarks/suppression_material.py ASSETS WORK

ASSETS holds models/mixed-3m (a Hugging Face folder of six layers or so) and, in data/, public texts as

- toxicity_surge.csv: Surge AI's toxicity data, text and toxic (0 or 1);
- topic_clinc150.csv: CLINC150, split, text and domain (ten, and out_of_scope);
- sentiment_uci.csv: UCI's Sentiment Labelled Sentences, text and positive (0 or 1);
- emotion_goemotions.csv: GoEmotions, split, text and ekman (seven, with a bar between two);
- wikitext_1k.jsonl and tinystories_2k.jsonl: plain texts, a thousand and two.

What the comparison measures with was seen neither by the readouts and calibrations nor by the SAE. Splits are seeded;
the SAE takes minutes on two cores, and is the same only where a processor rounds the same.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYER = 3
PLAIN = 100
"""Wikipedia passages, the last ones, for perplexity."""

Rows = list[tuple[str, str]]
"""Texts with their labels."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    print(
        f"{path.name}: {', '.join(f'{count} {label}' for label, count in sorted(Counter(c for _, c in rows).items()))}"
    )


def shuffled(rows: Iterable[tuple[str, str]]) -> Rows:
    found = list(rows)
    random.Random(0).shuffle(found)
    return found


def drawn(rows: Rows, each: int, more: Mapping[str, int] | None = None) -> Rows:
    """The first rows of each label: `each` of them, or as many as `more` says."""
    seen: Counter[str] = Counter()
    found = []
    for text, label in rows:
        seen[label] += 1
        if seen[label] <= (more or {}).get(label, each):
            found.append((text, label))
    return found


def toxicity(data: Path) -> tuple[Rows, Rows]:
    names = {"0": "other", "1": "toxic"}
    rows = shuffled((row["text"], names[row["toxic"]]) for row in read(data / "toxicity_surge.csv"))
    return rows[:600], rows[600:]


def topic(data: Path) -> tuple[Rows, Rows]:
    rows = [row for row in read(data / "topic_clinc150.csv") if row["domain"] != "out_of_scope"]
    train, test = (
        shuffled((r["text"], r["domain"]) for r in rows if r["split"] == split) for split in ("train", "test")
    )
    return drawn(train, 200), drawn(test, 30, {"travel": 150})


def sentiment(data: Path) -> tuple[Rows, Rows]:
    names = {"0": "negative", "1": "positive"}
    once = {row["text"]: names[row["positive"]] for row in read(data / "sentiment_uci.csv")}
    rows = shuffled(once.items())
    return rows[:2000], drawn(rows[2000:], 200)


def emotion(data: Path) -> tuple[Rows, Rows]:
    rows = [row for row in read(data / "emotion_goemotions.csv") if "|" not in row["ekman"]]
    train, test = (
        shuffled((r["text"], r["ekman"]) for r in rows if r["split"] == split) for split in ("train", "test")
    )
    return drawn(train, 400), drawn(test, 45, {"anger": 150})


def plain(data: Path, work: Path) -> None:
    lines = (data / "wikitext_1k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "wiki_train.jsonl").write_text("".join(lines[:-PLAIN]), encoding="utf-8")
    (work / "wiki.jsonl").write_text("".join(lines[-PLAIN:]), encoding="utf-8")
    print(f"wiki.jsonl: {sum(1 for line in lines[-PLAIN:] if json.loads(line)['text'])} plain texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    data, work = options.assets.resolve() / "data", options.work
    work.mkdir(parents=True, exist_ok=True)
    for make in (toxicity, topic, sentiment, emotion):
        for part, rows in zip(("train", "test"), make(data), strict=True):
            write(work / f"{make.__name__}_{part}.csv", rows)
    plain(data, work)
    model = work / "model"
    if not model.exists():
        model.symlink_to(options.assets.resolve() / "models" / "mixed-3m")
    if (work / "sae" / "cfg.json").exists():
        return
    seen = [data / "emotion_goemotions.csv", data / "topic_clinc150.csv", data / "tinystories_2k.jsonl"]
    seen += [work / name for name in ("toxicity_train.csv", "sentiment_train.csv", "wiki_train.jsonl")]
    texts = [word for path in seen for word in ("--text", str(path))]
    command = [sys.executable, str(HERE.parent / "examples" / "train_sae.py"), "--model", str(model), *texts]
    subprocess.run([*command, "--layer", str(LAYER), "--steps", "1500", "--out", str(work / "sae")], check=True)


if __name__ == "__main__":
    main()
