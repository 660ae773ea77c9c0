"""The text of single tokens, as answers that go token by token name them."""

from functools import lru_cache

from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """The text of single tokens; U+FFFD for bytes that are no character.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Beside a plain letter, so that a leading space shows.
        self._letter: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before = len(self._decode(self._letter))
        self.text = lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        return self._decode([*self._letter, token])[self._before :]

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens, skip_special_tokens=False)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], *, skip_special_tokens: bool) -> str:
    """The text of some tokens, spaces as they are."""
    # Mistral's own tokenizers, which vLLM uses, know no clean-up, and do none.
    more = {"clean_up_tokenization_spaces": False} if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
    text = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, **more)
    assert isinstance(text, str)  # a list only for a list of lists
    return text
