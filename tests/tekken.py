"""A tokenizer file in the form of Mistral's own (tekken), of single bytes and a few pairs."""

import base64
import json
from pathlib import Path

_PAIRS = (" s", " se", " sea", "th", "the")
_SPECIAL = 20
"""Those of old, which a file need not name."""


def write_tekken(folder: Path) -> Path:
    """Writes ``tekken.json`` to a folder, and returns the folder."""
    words = [bytes([number]) for number in range(256)] + [pair.encode() for pair in _PAIRS]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
        for rank, word in enumerate(words)
    ]
    config = {
        "pattern": r" ?\w+|[^\w]",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + _SPECIAL,
        "default_num_special_tokens": _SPECIAL,
        "version": "v3",
    }
    written = {"config": config, "vocab": vocab, "version": 1, "type": "tekken"}
    (folder / "tekken.json").write_text(json.dumps(written))
    return folder
