"""What the definition reads: ``readings`` and ``triggers`` of an answer, from what every site reads, in float64."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sae_steer.catalog import Catalog
from sae_steer.reference import Read, Token, encode, read_token
from sae_steer.schema import Readings, Trigger, parse_steering
from sae_steer.sites import Site
from tests.conformance.answers import Asked


def read_by_definition(
    asked: Asked, completion: Sequence[int], sites: Mapping[Site, Tensor], catalog: Catalog
) -> dict[str, Any] | None:
    """The part of a choice's block that is read; None where nothing was asked.

    Args:
        asked: The request.
        completion: Its answer, whose last token is never run through the model.
        sites: For each site ``[P + n - 1, D]``, what is read there.
        catalog: What names mean.
    """
    steering = parse_steering(asked.steering or {})
    if steering.readings is None and not steering.on:
        return None
    ids = [*asked.prompt, *completion[:-1]]
    tokens = [Token(p, len(asked.prompt), token) for p, token in enumerate(ids)]
    wanted = steering.readings if isinstance(steering.readings, list) else [steering.readings]
    readings = []
    for one in wanted:
        if one is not None:
            x = sites[catalog.sae(one.sae).site]
            reads = [(t, read_token(one, x[t.position], t, steering, catalog)) for t in tokens]
            readings.append(_reading(one, [(t, read) for t, read in reads if read is not None], catalog))
    return {"readings": readings, "triggers": [_trigger(one, tokens, sites, catalog) for one in steering.on]}


def _reading(asked: Readings, reads: list[tuple[Token, Read]], catalog: Catalog) -> dict[str, Any]:
    found: dict[str, Any] = {
        "sae": asked.sae,
        "site": str(catalog.sae(asked.sae).site),
        "at": asked.at,
        "features": asked.features,
    }
    if asked.per_token:
        found |= {"positions": [t.position for t, _ in reads], "tokens": [t.token for t, _ in reads]}
        if asked.features:
            found["values"] = [read.values for _, read in reads]
        if asked.top_k:
            found["top"] = [[list(pair) for pair in read.top] for _, read in reads]
    named = [[(t.position, read.values[n]) for t, read in reads] for n in range(len(asked.features))]
    found["summary"] = [_sums(f, values, reads) for f, values in zip(asked.features, named, strict=True)]
    if asked.top_k:
        listed = [(t.position, feature, value) for t, read in reads for feature, value in read.top]
        sums = [
            _sums(f, [(p, value) for p, feature, value in listed if feature == f], reads)
            for f in {feature for _, feature, _ in listed}
        ]
        found["top_summary"] = sorted(sums, key=lambda s: (-s["max"], s["feature"]))[: asked.top_k]
    return found


def _sums(feature: int, values: list[tuple[int, float]], reads: list[tuple[Token, Read]]) -> dict[str, Any]:
    """The sums of one feature over the tokens that were read, 0 on those that are not among its values."""
    largest = max((value for _, value in values), default=0.0)
    n = len(reads)
    return {
        "feature": feature,
        "max": largest,
        "argmax": next((p for p, value in values if value == largest), None),
        "mean": sum(value for _, value in values) / n if n else 0.0,
        "last": next((value for p, value in values if reads and p == reads[-1][0].position), 0.0),
        "fired": sum(value > 0 for _, value in values) / n if n else 0.0,
        "tokens": n,
    }


def _trigger(asked: Trigger, tokens: Sequence[Token], sites: Mapping[Site, Tensor], catalog: Catalog) -> dict[str, Any]:
    entry = catalog.sae(asked.sae)
    x = sites[entry.site]
    completion = [t for t in tokens if t.position >= t.prompt_length - 1]
    values = [(t.position, float(encode(entry.sae, x[t.position])[asked.feature])) for t in completion]
    fired = [(p, value) for p, value in values if value > asked.above]
    return {
        "sae": asked.sae,
        "feature": asked.feature,
        "above": asked.above,
        "action": asked.action,
        "fired": len(fired),
        "first": fired[0][0] if fired else None,
        "value": fired[0][1] if fired else None,
    }
