"""The text of single tokens, by the tokenizers of transformers; vLLM's own are asked where an engine runs."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.tokenization_mistral_common import MistralCommonBackend

from sae_steer import embedded
from sae_steer.token_texts import TokenTexts, decode
from tests.tekken import write_tekken


def test_a_leading_space_shows() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("Tell me about the sea.", add_special_tokens=False)
    assert "".join(map(texts.text, ids)) == "Tell me about the sea."
    assert any(texts.text(i).startswith(" ") for i in ids)


@pytest.mark.parametrize("clean_up", [False, True])
def test_spaces_stay_as_they_are_whatever_the_tokenizer_would_do(clean_up: bool, tmp_path: Path) -> None:
    tokenizer = MistralCommonBackend(write_tekken(tmp_path) / "tekken.json", clean_up_tokenization_spaces=clean_up)
    ids = tokenizer.encode("the sea .", add_special_tokens=False)
    assert decode(tokenizer, ids, skip_special_tokens=True) == "the sea ."
    assert [TokenTexts(tokenizer).text(i) for i in ids] == ["the", " sea", " ", "."]
