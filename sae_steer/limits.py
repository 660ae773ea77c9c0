"""What a host holds. Imports nothing heavy, so that a command line can be read without torch."""

import math
from dataclasses import dataclass

from sae_steer.errors import StartError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a host holds; requests beyond it are refused.

    Args:
        max_programs: Slots for programs of up to ``rows`` features a site.
        rows: Features (edited, gating or read) at one site in an ordinary slot.
        wide_programs: Slots for wider programs.
        wide_rows: Features at one site in a wide slot.
        max_edits: Edited features in one request, over all sites.
        dose_limit: Largest dose that any request may have, whatever it asks for.
        max_reading_values: Activations that one response may send back: tokens times values of each.
    """

    max_programs: int = 32
    rows: int = 16
    wide_programs: int = 4
    wide_rows: int = 512
    max_edits: int = 512
    dose_limit: float = math.inf
    max_reading_values: int = 65536

    def __post_init__(self) -> None:
        if self.wide_programs and self.wide_rows <= self.rows:
            raise StartError(
                f"Wide programs must be wider than the others: {self.wide_rows} features against {self.rows}. "
                "Widen them, or have none."
            )
        if self.max_programs < 1 or self.rows < 1:
            raise StartError("There must be at least one slot of at least one feature.")

    @property
    def widest(self) -> int:
        """The most rows that a program may have at one site."""
        return max(self.rows, self.wide_rows if self.wide_programs else 0)
