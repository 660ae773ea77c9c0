"""What of a program a cache of keys and values must know: which blocks it may have touched."""

from dataclasses import dataclass
from typing import Self

from sae_steer.program import Program


@dataclass(frozen=True, slots=True)
class Footprint:
    """What sets the keys and values of a steered request apart from those of others, for hosts that share them.

    Args:
        digest: Content hash of the edits.
        pieces: :meth:`Program.pieces` of the request's prompt length.
    """

    digest: str
    pieces: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, program: Program, prompt_length: int) -> Self:
        """The footprint of a request: that of its edits, whatever is read beside them."""
        edits = program.edits
        return cls("", ((0, 0),)) if edits is None else cls(edits.digest, edits.pieces(prompt_length))

    def key(self, start: int, end: int) -> str | None:
        """The key of positions ``start`` to ``end``; None where no selector holds there by position.

        The selectors are part of the key, and not the program alone: over the same tokens, the same program edits
        other positions where the prompt ends elsewhere. What follows an edit differs by the keys of what it follows.
        """
        here: list[tuple[int, int]] = []
        stops = [first for first, _ in self.pieces[1:]] + [end]
        for (first, mask), stop in zip(self.pieces, stops, strict=True):
            if first < end and stop > start:
                here.append((max(first, start) - start, mask))
        return f"{self.digest}@{here}" if any(mask for _, mask in here) else None
