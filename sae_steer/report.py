"""What steering did to one request: gathered step by step, told at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_steer.errors import DoseExceeded, NonFinite, RunFailed
from sae_steer.program import Program, SiteProgram
from sae_steer.readings import Reader
from sae_steer.sites import Site
from sae_steer.slots import Slot
from sae_steer_kernels import Flag


@dataclass(slots=True)
class SiteTally:
    """Sums over a request's tokens at one site.

    Args:
        part: What the program does there.
    """

    part: SiteProgram
    tokens: int = 0
    seen: int = -1
    dose_sum: float = 0.0
    dose_max: float = 0.0
    limited: int = 0
    held: NDArray[np.int64] = field(init=False)
    fired: NDArray[np.int64] = field(init=False)
    before: NDArray[np.float64] = field(init=False)
    after: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        rows = len(self.part.rows)
        self.held, self.fired = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.before, self.after = np.zeros(rows), np.zeros(rows)

    def add(
        self,
        positions: NDArray[np.int64],
        bits: NDArray[np.int32],
        before: NDArray[np.float32],
        after: NDArray[np.float32],
        dose: NDArray[np.float32],
        flags: NDArray[np.int32],
    ) -> int:
        """Adds a step's tokens; a position that is computed again after a preemption counts once.

        Args:
            positions: ``[t]`` absolute positions.
            bits: ``[t]`` selectors that hold.
            before: ``[t, K]`` activations f.
            after: ``[t, K]`` activations f'.
            dose: ``[t]``.
            flags: ``[t]`` of the kernel's :class:`Flag`.

        Returns:
            How many (token, feature) pairs changed.
        """
        new = (positions > self.seen) & ((flags & Flag.TOUCHED) != 0)
        if not new.any():
            return 0
        self.seen = max(self.seen, int(positions.max()))
        rows = len(self.part.rows)
        selectors = np.array([row.selector for row in self.part.rows])
        # Gate-only rows have selector -1: their shift is clamped, and they are masked out.
        held = ((bits[new, None] >> np.maximum(selectors, 0)) & 1).astype(bool) & (selectors >= 0)
        f, g = before[new, :rows].astype(np.float64), after[new, :rows].astype(np.float64)
        changed = held & (f != g)
        self.tokens += int(new.sum())
        self.held += held.sum(axis=0)
        self.fired += changed.sum(axis=0)
        self.before += np.where(held, f, 0).sum(axis=0)
        self.after += np.where(held, g, 0).sum(axis=0)
        told = dose[new & np.isfinite(dose)]  # a token of length zero has no dose
        self.dose_sum += float(told.sum())
        self.dose_max = max(self.dose_max, float(told.max(initial=0.0)))
        self.limited += int(((flags[new] & Flag.OVER_DOSE) != 0).sum())
        return int(changed.sum())


class Run:
    """A steered request while it runs.

    Args:
        program: What it asks.
        slot: The slot that holds its program.
        prompt_length: ``P``, the number of prompt tokens.
    """

    def __init__(self, program: Program, slot: Slot, prompt_length: int) -> None:
        self.program = program
        self.slot = slot
        self.prompt_length = prompt_length
        self.failure: RunFailed | None = None
        self.reader = Reader(program, prompt_length) if program.reads else None
        self._touched = 0
        self._seen = -1
        self._tallies = {part.site: SiteTally(part) for part in program.sites}

    def tally(self, site: Site) -> SiteTally | None:
        """The sums at one site; None where the program does nothing there."""
        return self._tallies.get(site)

    def touch(self, positions: NDArray[np.int64], touched: NDArray[np.bool_]) -> None:
        """Counts the positions that were touched at any site; one that is computed again counts once."""
        self._touched += int((touched & (positions > self._seen)).sum())
        self._seen = max(self._seen, int(positions.max()))

    def judge(self, site: Site, flags: NDArray[np.int32], dose: NDArray[np.float32]) -> None:
        """Decides from a step's ``flags [t]`` and ``dose [t]`` whether the request must end with an error."""
        if self.failure is None:
            over = bool((flags & Flag.OVER_DOSE).any())
            broken = bool((flags & Flag.NON_FINITE).any())
            self.failure = failure_of(self.program, site, broken=broken, over=over, dose=float(dose.max()))

    def report(self, name_of: Callable[[Site, str], str]) -> dict[str, Any]:
        """The ``applied`` block of an answer.

        Args:
            name_of: From a site and an SAE's or a vector's fingerprint to its name in the catalog.
        """
        return applied_block(list(self._tallies.values()), self._touched, name_of)


def failure_of(program: Program, site: Site, *, broken: bool, over: bool, dose: float) -> RunFailed | None:
    """The error that a request must end with after what happened at a site; None = it may go on.

    Args:
        program: What it asks.
        site: The site.
        broken: Whether a value there was not finite.
        over: Whether the dose limit was passed there.
        dose: The largest dose there.
    """
    if broken:
        return NonFinite(f"A value at {site} was not finite. The request was ended; others were not touched.")
    if over and program.on_dose == "fail":
        return DoseExceeded(
            f"The dose at {site} was {dose:.3g} of the token's length, beyond the limit of {program.dose_limit:g}. "
            "Lower the values, raise 'dose.limit', or set 'on_dose' to 'scale'."
        )
    return None


def applied_block(tallies: Sequence[SiteTally], touched: int, name_of: Callable[[Site, str], str]) -> dict[str, Any]:
    """The ``applied`` block of an answer.

    Args:
        tallies: One for each site of the program.
        touched: Tokens that were touched at any site.
        name_of: From a site and an SAE's or a vector's fingerprint to its name in the catalog.
    """
    counted = [tally for tally in tallies if tally.tokens]
    tokens = sum(tally.tokens for tally in counted)
    return {
        "sites": [str(tally.part.site) for tally in tallies if tally.part.edits],
        "features": [entry for tally in tallies for entry in _features(tally, name_of)],
        "tokens": touched,
        "fired": sum(int(tally.fired.sum()) for tally in counted),
        "dose": {
            "max": max((tally.dose_max for tally in counted), default=0.0),
            "mean": sum(tally.dose_sum for tally in counted) / tokens if tokens else 0.0,
            "limited": sum(tally.limited for tally in counted),
        },
    }


def _features(tally: SiteTally, name_of: Callable[[Site, str], str]) -> list[dict[str, Any]]:
    """One entry for each edited feature: tokens it was edited on, how often it changed, and its means there."""
    entries: list[dict[str, Any]] = []
    for i, row in enumerate(tally.part.rows):
        if row.selector < 0:
            continue
        tokens = int(tally.held[i])
        named: dict[str, Any] = {"site": str(tally.part.site)}
        if row.feature >= 0:
            named |= {"sae": name_of(tally.part.site, row.source), "feature": row.feature}
        else:
            named |= {"vector": name_of(tally.part.site, row.source)}
        named["fingerprint"] = row.source
        entries.append(
            named
            | {
                "op": row.op,
                "tokens": tokens,
                "fired": int(tally.fired[i]),
                "mean_before": float(tally.before[i]) / tokens if tokens else 0.0,
                "mean_after": float(tally.after[i]) / tokens if tokens else 0.0,
            }
        )
    return entries
