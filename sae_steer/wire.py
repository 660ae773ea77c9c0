"""A compiled program as text, for hosts whose parts live in several processes.

The text is data and nothing else; whoever receives it checks it against its own catalog before anything runs.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from pydantic import TypeAdapter, ValidationError

from sae_steer.catalog import Catalog
from sae_steer.compiler import MAX_SELECTORS
from sae_steer.errors import SchemaError
from sae_steer.limits import Limits
from sae_steer.program import GainTable, Program, Row, Selector, SiteProgram
from sae_steer.sae import Activation
from sae_steer.schema import MAX_RANGES, MAX_READ_FEATURES, MAX_READINGS, MAX_TOP_K, MAX_TRIGGERS
from sae_steer.sites import Site
from sae_steer.tables import GAIN_BINS

_PROGRAM: TypeAdapter[Program] = TypeAdapter(Program)
_LARGEST = float(np.finfo(np.float32).max)


def to_text(program: Program) -> str:
    """A program as JSON (with Python's spelling of infinities); floats come back to the bit."""
    return json.dumps(_PROGRAM.dump_python(program, mode="python"), separators=(",", ":"))


def parse(text: str) -> Program:
    """Reads :func:`to_text`; raises :class:`SchemaError` for anything else."""
    if not isinstance(text, str):  # it came from outside, whatever its type says
        raise SchemaError("This is not a compiled program: it is no text.")
    return _parsed(text)


@lru_cache(maxsize=32)  # requests that use one calibration send the same megabyte, and programs are frozen
def _parsed(text: str) -> Program:
    try:
        return _PROGRAM.validate_json(text)
    except ValidationError as error:
        raise SchemaError(f"This is not a compiled program: {error.error_count()} faults.") from None


def check(program: Program, catalog: Catalog, limits: Limits, sites: Sequence[Site]) -> None:
    """Raises :class:`SchemaError` for a program that means nothing with this catalog, these limits and sites."""
    fault = _fault(program, catalog, limits, sites)
    if fault is not None:
        raise SchemaError(f"This compiled program cannot run here: {fault}.")


def _fault(program: Program, catalog: Catalog, limits: Limits, sites: Sequence[Site]) -> str | None:
    """What is wrong with a program, in words; None where nothing is."""
    if not program.sites or program.rows > limits.widest:
        return "it has no place, or more features at one place than a slot holds"
    if not 0 < len(program.selectors) <= MAX_SELECTORS:
        return "it has no selector, or too many"
    if len(set(program.selectors)) != len(program.selectors) or not all(map(_selects, program.selectors)):
        return "a selector is there twice, or holds nowhere that there is"
    if math.isnan(program.dose_limit) or program.dose_limit <= 0 or program.dose_limit > limits.dose_limit:
        return "its dose limit is not one of this host"
    if not _fits(program.dose_limit):
        return "its dose limit is too large for a float32"
    if len({part.site for part in program.sites}) != len(program.sites):
        return "one place is named twice"
    for part in program.sites:
        if part.site not in sites:
            return f"{part.site} is not hooked"
        fault = _part_fault(part, len(program.selectors), catalog)
        if fault is not None:
            return fault
        if not part.rows and not any(reading.site == part.site and reading.top_k for reading in program.readings):
            return f"it names nothing at {part.site}"
    return _reads_fault(program, catalog)


def _reads_fault(program: Program, catalog: Catalog) -> str | None:
    """What is wrong with what a program reads."""
    rows = {part.site: part.rows for part in program.sites}
    entries = {(entry.site, entry.sae.fingerprint): entry for entry in catalog.saes.values()}
    # One file may be in the catalog twice, and held whole once.
    wholes = {(entry.site, entry.sae.fingerprint) for entry in catalog.saes.values() if entry.whole}
    named = sum(len(reading.rows) for reading in program.readings)
    if len(program.readings) > MAX_READINGS or len(program.triggers) > MAX_TRIGGERS or named > MAX_READ_FEATURES:
        return "it reads more than a request may"
    for each in program.asks:
        if each.site not in rows or not 0 <= each.selector < len(program.selectors):
            return "it reads where it has no place, or on tokens that no selector names"
        if program.selectors[each.selector].skip_token is not None or program.selectors[each.selector].token_in:
            return "it reads by token ids"
    for reading in program.readings:
        key, own = (reading.site, reading.source), rows[reading.site]
        if key not in entries or not all(0 <= i < len(own) and own[i].source == reading.source for i in reading.rows):
            return "it reads an SAE or a row that is not there"
        most = min(MAX_TOP_K, entries[key].sae.spec.n_features)
        if not 0 <= reading.top_k <= most or (reading.top_k and key not in wholes):
            return "it reads more of a dictionary than there is"
    for trigger in program.triggers:
        if not 0 <= trigger.row < len(rows[trigger.site]) or not abs(trigger.above) <= _LARGEST:
            return "a trigger has a row or a threshold that is not there"
    return None


def _selects(selector: Selector) -> bool:
    """Whether a selector's numbers are positions, ranges and token ids that a request may name."""
    numbers = [edge for bounds in selector.ranges for edge in bounds]
    numbers += [*(selector.token_in or ()), *([selector.skip_token] if selector.skip_token is not None else [])]
    ordered = all(start < end for start, end in selector.ranges)
    return ordered and len(selector.ranges) <= MAX_RANGES and all(0 <= number < 2**31 for number in numbers)


def _part_fault(part: SiteProgram, selectors: int, catalog: Catalog) -> str | None:
    """What is wrong with a program at one site."""
    entries = [entry for entry in catalog.saes.values() if entry.site == part.site]
    known = {entry.sae.fingerprint: entry.sae.spec for entry in entries}
    wholes = {entry.sae.fingerprint for entry in entries if entry.whole}
    vectors = {vector.fingerprint for vector in catalog.vectors.values()} if part.site.read == part.site.write else ()
    if len({(row.source, row.feature) for row in part.rows}) != len(part.rows):
        return f"it names one feature twice at {part.site}"
    if part.drop is not None and part.drop not in wholes:
        return "it drops the error of an SAE that is not there as a whole"
    for row in part.rows:
        spec = known.get(row.source)
        inside = 0 <= row.feature < spec.n_features if spec is not None else row.feature == -1 and row.source in vectors
        if not inside:
            return f"{row.source} has no feature {row.feature} at {part.site}"
        if spec is not None and spec.activation is Activation.TOPK and row.source not in wholes:
            return f"{row.source} is a TopK SAE, and is not there as a whole"
        if not -1 <= row.selector < selectors:
            return "a row has a selector that is not there"
        if row.gate is not None and not 0 <= row.gate.row < len(part.rows):
            return "a row has a gate that is not there"
        if not _numbers_fit(row):
            return "a row has a number that is not finite, or too large for a float32"
    return None


def _numbers_fit(row: Row) -> bool:
    """Whether the tables can hold a row's numbers; where one could not, its request would end the engine."""
    bounds = [row.lo, row.hi, row.mask_lo, row.mask_hi]
    bounds += [row.gate.above, row.gate.below] if row.gate is not None else []
    finite = [row.scale, row.shift, row.gamma]
    if row.gain is not None:
        if not _gains_fit(row.gain):
            return False
        finite += [row.gain.width_pos, row.gain.width_neg]
    return all(map(_fits, bounds + finite)) and all(map(math.isfinite, finite))


def _gains_fit(gain: GainTable) -> bool:
    try:
        sides = gain.values(), gain.values(negative=True)
    except ValueError:
        return False
    if not all(values.size <= GAIN_BINS and bool(np.isfinite(values).all()) for values in sides):
        return False
    return min(gain.width_pos, gain.width_neg) >= 0


def _fits(number: float) -> bool:
    return math.isinf(number) or abs(number) <= _LARGEST  # NaN is in no order
