"""The compiled program: what one request asks, resolved against the catalog, frozen, hashable and free of any host.

Two requests that mean the same have equal programs, whatever names they used; the digest is their content (SAE
fingerprints, canonical edits), never a name.
"""

import base64
import enum
import hashlib
import json
import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae_steer.sites import Site


class Phase(enum.StrEnum):
    """Which positions of a request of ``P`` prompt tokens a selector holds on."""

    ALL = "all"
    PROMPT = "prompt"  # p < P - 1
    COMPLETION = "completion"  # p >= P - 1: the positions whose output predicts a completion token
    RANGES = "ranges"  # half-open, absolute


@dataclass(frozen=True, slots=True)
class Selector:
    """Which tokens an edit holds on, by position and by token id; gates by features are the kernel's business.

    Args:
        phase: Which positions.
        ranges: Half-open position ranges, for :attr:`Phase.RANGES`.
        skip_token: Id of the beginning-of-sequence token where it is left alone.
        token_in: Token ids on which the edit holds; None = every one.
    """

    phase: Phase
    ranges: tuple[tuple[int, int], ...] = ()
    skip_token: int | None = None
    token_in: tuple[int, ...] | None = None

    def by_position(self, positions: NDArray[np.int64], prompt_length: int) -> NDArray[np.bool_]:
        """Whether the selector's positions hold: ``[T]`` absolute positions to ``[T]``."""
        match self.phase:
            case Phase.ALL:
                return np.ones(positions.shape, dtype=np.bool_)
            case Phase.PROMPT:
                return positions < prompt_length - 1
            case Phase.COMPLETION:
                return positions >= prompt_length - 1
            case Phase.RANGES:
                held = np.zeros(positions.shape, dtype=np.bool_)
                for start, end in self.ranges:
                    held |= (positions >= start) & (positions < end)
                return held

    def count(self, tokens: int, prompt_length: int) -> int:
        """On how many of a request's first ``tokens`` positions the selector's positions hold."""
        prompt = min(max(prompt_length - 1, 0), tokens)
        match self.phase:
            case Phase.ALL:
                return tokens
            case Phase.PROMPT:
                return prompt
            case Phase.COMPLETION:
                return tokens - prompt
            case Phase.RANGES:
                counted = end_of_last = 0
                for start, end in sorted(self.ranges):
                    start, end = max(start, end_of_last), min(end, tokens)
                    if start < end:
                        counted, end_of_last = counted + end - start, end
                return counted

    def holds(self, positions: NDArray[np.int64], tokens: NDArray[np.int64], prompt_length: int) -> NDArray[np.bool_]:
        """Whether an edit holds on each token, its feature gate aside.

        Args:
            positions: ``[T]`` absolute positions in the request.
            tokens: ``[T]`` token ids.
            prompt_length: ``P``, the number of prompt tokens.
        """
        held = self.by_position(positions, prompt_length)
        if self.skip_token is not None:
            held = held & (tokens != self.skip_token)
        if self.token_in is not None:
            held = held & np.isin(tokens, self.token_in)
        return held


@dataclass(frozen=True, slots=True)
class GainTable:
    """A gain ``G(f)`` for each side of zero: values at the centres ``(b + 1/2) * width`` of the bins of ``|f|``.

    The values are kept as text, base64 of little-endian float32, which is what the tables hold: a calibration may have
    hundreds of thousands of them, and as one piece they are hashed, compared and sent at once.

    Args:
        width_pos: Width of a bin of positive activations.
        positive: The values there.
        width_neg: Width of a bin of negative ones.
        negative: The values there.
    """

    width_pos: float
    positive: str
    width_neg: float = 0.0
    negative: str = ""

    @classmethod
    def of(cls, width_pos: float, positive: ArrayLike, width_neg: float = 0.0, negative: ArrayLike = ()) -> Self:
        """Packs values, rounded to float32."""
        return cls(width_pos, _packed(positive), width_neg, _packed(negative))

    def values(self, negative: bool = False) -> NDArray[np.float32]:
        """The values of one side ``[B]``; raises ``ValueError`` for text that :meth:`of` never makes."""
        text = self.negative if negative else self.positive
        found = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
        if _packed(found) != text:
            raise ValueError("not the text of these values")
        return found


@dataclass(frozen=True, slots=True)
class Gate:
    """An edit holds where ``above < f < below`` for the feature of another row of the same site."""

    row: int
    above: float = -math.inf
    below: float = math.inf


@dataclass(frozen=True, slots=True)
class Row:
    """One feature, or one plain direction, that a program reads at a site and mostly edits.

    ``f' = clip(scale f + shift, lo, hi) * G(f)^gamma``, and 0 where ``mask_lo <= f <= mask_hi``.

    Args:
        source: Fingerprint of the SAE, or of the vector.
        feature: Number of the feature; -1 for a plain direction.
        op: The operation's name, for the report; "" for a row that only gates others.
        unit: For a direction, whether its rows are the unit direction (else it is added as it is).
        norm_units: Whether shift, lo and hi are multiples of the token's length.
        selector: Number of the selector in the program; -1 for a row that only gates others.
        gate: The feature gate.
        gain: The gain table.
    """

    source: str
    feature: int
    op: str = ""
    unit: bool = False
    scale: float = 1.0
    shift: float = 0.0
    lo: float = -math.inf
    hi: float = math.inf
    mask_lo: float = math.inf
    mask_hi: float = -math.inf
    gamma: float = 1.0
    norm_units: bool = False
    selector: int = -1
    gate: Gate | None = None
    gain: GainTable | None = None

    @property
    def select(self) -> int:
        """Bit mask: the row's edit holds on tokens whose bits meet it."""
        return 1 << self.selector if self.selector >= 0 else 0


@dataclass(frozen=True, slots=True)
class SiteProgram:
    """What a program does at one site.

    Args:
        site: The site.
        rows: Its rows, at most as many as a slot holds.
        drop: Fingerprint of the SAE whose reconstruction error is dropped; None = keep.
    """

    site: Site
    rows: tuple[Row, ...]
    drop: str | None = None

    @property
    def edits(self) -> bool:
        """Whether anything is edited there; else it is only read."""
        return any(row.selector >= 0 for row in self.rows)

    @property
    def drop_selectors(self) -> tuple[int, ...]:
        """Selectors on whose tokens the error is dropped: those of the dropped SAE's edits, whatever gates decide."""
        held = {row.selector for row in self.rows if row.source == self.drop and row.selector >= 0}
        return tuple(sorted(held))


@dataclass(frozen=True, slots=True)
class Reading:
    """Activations of one SAE that are sent back.

    Args:
        site: Where the SAE is.
        source: Its fingerprint.
        rows: Rows of the site that hold the named features, in the order in which they were named.
        selector: Number of the selector that says on which tokens.
        top_k: How many of each token's largest features are sent beside them.
        after: Whether edited features are told with their new value.
        per_token: Whether every token's values are sent, and not the summary alone.
    """

    site: Site
    source: str
    rows: tuple[int, ...]
    selector: int
    top_k: int = 0
    after: bool = False
    per_token: bool = True


@dataclass(frozen=True, slots=True)
class Trigger:
    """Acts on the request where a feature is above a threshold, before any edit of its site.

    Args:
        site: Where the feature's SAE is.
        row: Row of the site that holds the feature.
        selector: Number of the selector that says on which tokens.
        above: The threshold, strict.
        stop: Whether the answer ends there; else it is only told.
    """

    site: Site
    row: int
    selector: int
    above: float
    stop: bool


@dataclass(frozen=True)
class Program:
    """A request's interventions, resolved, validated and compiled, and what it wants to be told.

    Args:
        sites: What happens at each site, in the model's order. Rows that are only read come last.
        selectors: The distinct selectors of all rows and readings, those of edits first; each is referred to by number.
        dose_limit: Largest ``|sum of deltas| / |x|`` per token and site; inf = no limit.
        on_dose: What happens beyond it.
        readings: What is sent back.
        triggers: What acts on the request.
    """

    sites: tuple[SiteProgram, ...]
    selectors: tuple[Selector, ...]
    dose_limit: float = math.inf
    on_dose: Literal["fail", "scale"] = "fail"
    readings: tuple[Reading, ...] = ()
    triggers: tuple[Trigger, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Content hash: equal programs, and only they, have equal digests."""
        canonical = json.dumps(_plain(self), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def edits(self) -> "Program | None":
        """The program without what is only read: what changes keys and values; None where nothing is edited."""
        if not self.readings and not self.triggers:
            return self
        sites: list[SiteProgram] = []
        for part in self.sites:
            gates = {row.gate.row for row in part.rows if row.gate is not None}
            # Rows that are only read are the last, so the numbers of the others stay.
            rows = tuple(row for i, row in enumerate(part.rows) if row.selector >= 0 or i in gates)
            if part.edits:
                sites.append(SiteProgram(part.site, rows, part.drop))
        if not sites:
            return None
        used = 1 + max(row.selector for part in sites for row in part.rows)
        return Program(tuple(sites), self.selectors[:used], self.dose_limit, self.on_dose)

    @property
    def asks(self) -> tuple[Reading | Trigger, ...]:
        """Readings and triggers."""
        return (*self.readings, *self.triggers)

    @property
    def reads(self) -> int:
        """Bit mask of the selectors on whose tokens something is read."""
        held = 0
        for each in self.asks:
            held |= 1 << each.selector
        return held

    def first_read(self, prompt_length: int) -> int | None:
        """The first position where something is read; None = nowhere. What comes from a cache is read by nobody."""
        found: list[int] = []
        for each in self.asks:
            selector = self.selectors[each.selector]
            match selector.phase:
                case Phase.RANGES:
                    found.append(selector.ranges[0][0])
                case Phase.COMPLETION:
                    found.append(max(prompt_length - 1, 0))
                case _:
                    found.append(0)
        return min(found, default=None)

    @property
    def rows(self) -> int:
        """The largest number of rows at one site: what a slot must hold."""
        return max(len(site.rows) for site in self.sites)

    def bits(self, positions: NDArray[np.int64], tokens: NDArray[np.int64], prompt_length: int) -> NDArray[np.int32]:
        """For each token, the mask of the selectors that hold on it: bit j for selector j, ``[T]`` int32."""
        mask = np.zeros(positions.shape, dtype=np.int32)
        for number, selector in enumerate(self.selectors):
            mask |= selector.holds(positions, tokens, prompt_length).astype(np.int32) << np.int32(number)
        return mask

    def footprint(self, positions: NDArray[np.int64], prompt_length: int) -> NDArray[np.bool_]:
        """Which positions the program may touch, whatever gates and token ids decide there: ``[T]`` to ``[T]``."""
        held = np.zeros(positions.shape, dtype=np.bool_)
        for selector in self.selectors:
            held |= selector.by_position(positions, prompt_length)
        return held

    def pieces(self, prompt_length: int) -> tuple[tuple[int, int], ...]:
        """The selectors by position alone, as ``(first position, mask)`` from position 0 on; each differs from the
        one before it, and the last goes on for ever."""
        edges = {0}
        for selector in self.selectors:
            if selector.phase in (Phase.PROMPT, Phase.COMPLETION):
                edges.add(max(prompt_length - 1, 0))
            edges.update(edge for bounds in selector.ranges for edge in bounds)
        starts = np.array(sorted(edges), dtype=np.int64)
        masks = np.zeros(starts.shape, dtype=np.int32)
        for number, selector in enumerate(self.selectors):
            masks |= selector.by_position(starts, prompt_length).astype(np.int32) << np.int32(number)
        new = np.append(True, masks[1:] != masks[:-1])
        return tuple(zip(starts[new].tolist(), masks[new].tolist(), strict=True))

    def by_token(self, vocabulary: int) -> NDArray[np.int32]:
        """For each token id below ``vocabulary``, the mask of the selectors that its id allows: ``[V]`` int32."""
        allowed = np.full(vocabulary, (1 << len(self.selectors)) - 1, dtype=np.int32)
        for number, selector in enumerate(self.selectors):
            bit = np.int32(1 << number)
            if selector.token_in is not None:
                held = np.zeros(vocabulary, dtype=np.bool_)
                held[[token for token in selector.token_in if token < vocabulary]] = True
                allowed[~held] &= ~bit
            if selector.skip_token is not None and selector.skip_token < vocabulary:
                allowed[selector.skip_token] &= ~bit
        return allowed

    def describe(self) -> dict[str, Any]:
        """What was asked, for people and logs: sites, operations and numbers of features."""
        return {
            "program": self.digest,
            "sites": {
                str(site.site): [f"{row.op} {row.feature}" for row in site.rows if row.selector >= 0]
                for site in self.sites
                if site.edits
            },
        }


def _packed(values: ArrayLike) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


@cache
def _names(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass; None for another type."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) and kind is not Site else None


def _plain(value: Any) -> Any:
    """A value as plain JSON with every float exact (hex), for hashing."""
    kind = type(value)
    if kind is float:
        return (value + 0.0).hex()  # -0.0 and 0.0 are one program
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is tuple:
        return [_plain(item) for item in value]
    names = _names(kind)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    return str(value)  # a site, or one of an enumeration
