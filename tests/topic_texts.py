"""Labelled text whose labels hold by construction: sentences of the grammar that the embedded model was trained on."""

import importlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "embedded_model"


@cache
def _modules() -> tuple[Any, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("corpus"), importlib.import_module("grammar")
    finally:
        sys.path.remove(str(FOLDER))


def sentences(count: int, seed: int, topics: tuple[str, ...]) -> list[tuple[str, str]]:
    """``count`` sentences of some topics, with their topic."""
    corpus, grammar = _modules()
    writer = corpus.Writer(grammar.Grammar.load(), seed)
    found: list[tuple[str, str]] = []
    for document in writer.documents(10**6):
        for turn in document:
            found += [(s.text, s.topic) for s in turn.sentences if s.topic in topics and len(s.text.split()) > 4]
        if len(found) >= count:
            return found[:count]
    raise AssertionError("endless")


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A JSONL file of ``text`` and ``label``."""
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows), encoding="utf-8")
    return path
