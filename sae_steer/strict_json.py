"""JSON as bodies and profiles may be written: what the standard parser would let pass is an error here."""

import json
import math
from typing import Any

from sae_steer.errors import SchemaError

MAX_DEPTH = 32


def loads(text: str | bytes) -> Any:
    """Parses JSON strictly; the standard parser would let these pass.

    Raises:
        SchemaError: It is not JSON, repeats a key, holds NaN or an infinity (also as 1e999), or nests absurdly.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise SchemaError(f"The key {twice!r} appears twice in one object.", code="duplicate_key")
        return found

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise SchemaError(f"{digits} is not a finite number.", code="non_finite_number")
        return value

    def constant(word: str) -> float:
        raise SchemaError(f"{word} is not JSON; numbers must be finite.", code="non_finite_number")

    try:
        # Decoded here: the standard parser would also take UTF-16 and UTF-32.
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=constant)
    except RecursionError:
        raise SchemaError("The body nests too deeply.", code="too_deep") from None
    except ValueError as error:
        raise SchemaError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if _depth(value) > MAX_DEPTH:
        raise SchemaError(f"The body nests deeper than {MAX_DEPTH} levels.", code="too_deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON can spell half of a character; no tokenizer can read it.
        raise SchemaError("The body holds half of a character (a lone surrogate).", code="invalid_unicode") from None
    return value


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
