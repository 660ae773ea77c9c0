"""A compiled program as text, for hosts whose parts live in several processes.

The text is data and nothing else; whoever receives it checks it against its own catalog before anything runs.
"""

import json
import math
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from sae_steer.catalog import Catalog
from sae_steer.compiler import MAX_SELECTORS
from sae_steer.errors import SchemaError
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.sites import Site

_PROGRAM: TypeAdapter[Program] = TypeAdapter(Program)
_FINITE = ("scale", "shift", "gamma")


def to_text(program: Program) -> str:
    """A program as JSON (with Python's spelling of infinities); floats come back to the bit."""
    return json.dumps(_PROGRAM.dump_python(program, mode="python"), separators=(",", ":"))


def parse(text: str) -> Program:
    """Reads :func:`to_text`; raises :class:`SchemaError` for anything else."""
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
    if math.isnan(program.dose_limit) or program.dose_limit <= 0 or program.dose_limit > limits.dose_limit:
        return "its dose limit is not one of this host"
    if len({part.site for part in program.sites}) != len(program.sites):
        return "one place is named twice"
    for part in program.sites:
        if part.site not in sites:
            return f"{part.site} is not hooked"
        known = {
            entry.sae.fingerprint: entry.sae.spec.n_features
            for entry in catalog.saes.values()
            if entry.site == part.site
        }
        if part.drop is not None and part.drop not in known:
            return "it drops the error of an SAE that is not there"
        vectors = {vector.fingerprint for vector in catalog.vectors.values()}
        for row in part.rows:
            inside = 0 <= row.feature < known.get(row.source, 0) or (row.feature == -1 and row.source in vectors)
            if not inside:
                return f"{row.source} has no feature {row.feature} at {part.site}"
            if not -1 <= row.selector < len(program.selectors):
                return "a row has a selector that is not there"
            if row.gate is not None and not 0 <= row.gate.row < len(part.rows):
                return "a row has a gate that is not there"
            if not all(math.isfinite(getattr(row, name)) for name in _FINITE):
                return "a row has a number that is not finite"
    return None
