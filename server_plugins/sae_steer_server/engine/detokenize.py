"""From tokens to text, one token at a time: no half characters, and nothing of a stop text.

The incremental decoder of the tokenizers library (``DecodeStream``, 0.23) is not used: it raises a bare ``Exception``
on runs of bytes that are no UTF-8, which steered models do produce (one in eight random sequences of the byte-fallback
vocabularies of 361 and 512 tokens).
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from sae_steer.token_texts import decode

_UNKNOWN = "\ufffd"
# A character has at most four bytes. Longer stretches that end in U+FFFD are no text, and how many U+FFFD they are
# depends on what follows: wait a little, but not for ever.
_PATIENCE = 16
_CONTEXT = 8


class Detokenizer:
    """The text of a completion as its tokens arrive, with the prompt's last token as its left neighbour.

    Sentence-piece decoders drop a leading space, so tokens are decoded beside the last ones told, never alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._context: list[int] = []
        self._context_text = ""
        for length in range(1, min(len(prompt), _CONTEXT) + 1):
            tail = list(prompt[-length:])
            text = self._decode(tail)
            if text and _UNKNOWN not in text:
                self._context, self._context_text = tail, text
                break

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is in the making."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_UNKNOWN) and len(self._pending) < _PATIENCE:
            return ""
        if text and _UNKNOWN not in text:
            self._context, self._context_text = self._pending, self._decode(self._pending)
        self._pending = []
        return text

    def finish(self) -> str:
        """The text of the tokens that are left; what is no whole character is U+FFFD."""
        text = self._new_text()
        self._pending = []
        return text

    def _new_text(self) -> str:
        if not self._pending:
            return ""
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Bytes that follow bytes can undo them in a byte-fallback decoder; what was told stays told.
        return self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens, skip_special_tokens=True)


class StopTexts:
    """Holds back what may be the beginning of a stop text, and cuts at the first one that is complete.

    Which one ends first decides, so the answer depends on the text alone and never on how it was cut into tokens.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be told now. After a stop text was found there is none."""
        if self.found:
            return ""
        self._held += text
        ends = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if ends:
            end, length = min(ends)
            self.found = True
            return self._told(end + length, keep=False)
        return self._told(len(self._held) - self._beginning(), keep=True)

    def finish(self) -> str:
        """What was held back, when no stop text can come any more."""
        return self._told(len(self._held), keep=False)

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _told(self, count: int, *, keep: bool) -> str:
        told, rest = self._held[:count], self._held[count:]
        self._held = rest if keep else ""
        return told
