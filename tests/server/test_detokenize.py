import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_steer.token_texts import TokenTexts
from sae_steer_server.engine.detokenize import Detokenizer, StopTexts
from tests.server.engine_host import tiny_tokenizer

TINY = tiny_tokenizer()
MODELS = ("stories260k", "babyllama-char361", "mixed-3m")


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@given(st.text(min_size=1), st.integers(0, 40))
def test_text_arrives_whole_and_in_whole_characters(text: str, cut: int) -> None:
    text = text.replace("\ufffd", "")
    tokens = encode(TINY, text)
    told = pieces(TINY, tokens[:cut], tokens[cut:])
    if TINY.decode(tokens[:cut]).endswith("\ufffd"):
        return  # the prompt ends within a character
    assert "".join([str(TINY.decode(tokens[:cut])), *told]) == text
    assert "\ufffd" not in "".join(told)


@given(st.lists(st.integers(0, 299), max_size=60))
def test_any_tokens_give_their_text(tokens: list[int]) -> None:
    told = "".join(pieces(TINY, [], tokens))
    assert told.replace("\ufffd", "") == TINY.decode(tokens, skip_special_tokens=True).replace("\ufffd", "")


@pytest.mark.parametrize("name", MODELS)
def test_real_tokenizers(assets: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    text = "Once upon a time → Lily, 'naïve', said: 漢字 🎈🎈 yes.\n The end."
    tokens = encode(tokenizer, text)
    whole = tokenizer.decode(tokens)
    for cut in range(1, len(tokens)):
        head = tokenizer.decode(tokens[:cut])
        if "\ufffd" not in head:
            assert head + "".join(pieces(tokenizer, tokens[:cut], tokens[cut:])) == whole


@pytest.mark.parametrize("name", MODELS)
def test_real_tokenizers_take_any_tokens(assets: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    choice = random.Random(0)
    for _ in range(300):
        tokens = [choice.randrange(len(tokenizer)) for _ in range(30)]
        pieces(tokenizer, tokens[:10], tokens[10:])


def test_nonsense_is_told_before_long() -> None:
    continuation = encode(TINY, "é")[1]  # a byte that cannot begin a character
    detokenizer = Detokenizer(TINY, [])
    told = [detokenizer.push(continuation) for _ in range(40)]
    assert "".join(told)


def by_definition(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Reads character by character; the first stop text to end cuts, and of several the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    st.lists(st.text("abé", max_size=5), max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_cut_as_by_definition(cuts: list[str], stop: list[str]) -> None:
    stops = StopTexts(stop)
    told = ""
    for piece in cuts:
        told += stops.push(piece)
        text, _ = by_definition("".join(cuts), stop)
        assert text.startswith(told)
    told += "" if stops.found else stops.finish()
    assert (told, stops.found) == by_definition("".join(cuts), stop)


def test_nothing_is_held_back_without_need() -> None:
    stops = StopTexts(["stop!"])
    assert stops.push("do not st") == "do not "
    assert stops.push("ay, st") == "stay, "
    assert stops.push("op") == ""
    assert stops.push("! and more") == ""
    assert stops.found
    assert stops.push("more") == ""


def test_single_tokens_have_texts(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260k")
    texts = TokenTexts(tokenizer)
    tokens = encode(tokenizer, "Lily was")
    assert "".join(texts.text(token) for token in tokens) == " Lily was"
    assert texts.text(1) == "<s>"
    assert TokenTexts(TINY).text(encode(TINY, "é")[0]) == "\ufffd"
