"""``POST /v1/steering/activations``: what fires on a text, and what differs between two.

Each asks the route of completions for one token with readings over the whole text, twice: first for the largest
features, then for those by their numbers, which gives them exactly where another text lists them and this one does not.
So it waits, counts and is limited as two such requests are, on any host whose completions can be read.
"""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from sae_steer.closed import Closed, Name
from sae_steer.sae import Labels
from sae_steer_http.activation_replies import ActivationList, ActiveFeature, OnText, Text
from sae_steer_http.bodies import parse_body, read_json
from sae_steer_http.errors import SaeNotFound, error_json
from sae_steer_http.inner_call import post_json
from sae_steer_http.openapi import errors, request_body
from sae_steer_http.service import SteeringService, service_of

MAX_TOP_K = 64
_CANDIDATES = 128
"""Features of each text that are compared: the most that one reading lists."""

_ROUNDING = 1e-3
"""Maxima that are no further apart than this part of themselves are equal: batches of other shapes round otherwise."""
_READING = re.compile(r"^steering\.readings(\[\d+\])?\.?")

router = APIRouter(prefix="/v1/steering", tags=["steering"])

_Line = Annotated[str, Field(min_length=1, max_length=2**20)]


class ActivationsRequest(Closed):
    """A text, or two that are compared."""

    sae: Name
    text: _Line | None = None
    texts: Annotated[list[_Line], Field(min_length=2, max_length=2)] | None = Field(None, description="Two texts.")
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K, description="How many features are sent back.")] = 20

    @model_validator(mode="after")
    def _one_of_both(self) -> "ActivationsRequest":
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either 'text', or 'texts' with two of them")
        return self

    def all(self) -> list[str]:
        """The one or two texts."""
        return self.texts if self.texts is not None else [self.text or ""]


@router.post(
    "/activations",
    responses={200: {"model": ActivationList}, **errors(400, 401, 404, 413, 429, 503)},
    openapi_extra=request_body(ActivationsRequest),
)
async def activations(request: Request) -> Response:
    """The features with the largest activations on a text, or with the largest differences between two."""
    service = service_of(request)
    body = parse_body(ActivationsRequest, await read_json(request, service.max_body_bytes))
    entry = service.catalog.saes.get(body.sae)
    if entry is None:
        known = "GET /v1/steering/saes lists those there are."
        raise SaeNotFound(f"sae: there is no SAE {body.sae!r}. {known}", param="sae")
    count = min(_CANDIDATES, entry.sae.spec.n_features)
    found = await _read(request, service, body, [{"top_k": count, "per_token": False}])
    if isinstance(found, Response):
        return found
    largest = [{top["feature"]: float(top["max"]) for top in reading["top_summary"]} for (reading,) in found]
    wanted, floor = _candidates(largest, count, body.top_k if body.text is not None else service.limits.widest)
    if not wanted:
        return _reply(ActivationList(sae=body.sae, floor=floor, texts=[Text(tokens=[]) for _ in largest], data=[]))
    # The first names all of them; the second, of one feature alone, brings the texts of the tokens.
    exact: list[dict[str, Any]] = [{"features": wanted, "per_token": False}, {"features": wanted[:1]}]
    read = await _read(request, service, body, exact)
    if isinstance(read, Response):
        return read
    labels = entry.labels if entry.labels is not None else Labels({})
    features = [_feature(feature, place, read, labels) for place, feature in enumerate(wanted)]
    texts = [Text(tokens=per_token["text"]) for _, per_token in read]
    return _reply(ActivationList(sae=body.sae, floor=floor, texts=texts, data=_ranked(features)[: body.top_k]))


def _reply(answer: ActivationList) -> Response:
    return Response(answer.encode(), media_type="application/json")


def _candidates(largest: list[dict[int, float]], count: int, limit: int) -> tuple[list[int], float]:
    """The features to look at, by their largest activation on any text, and a bound on those that are left out.

    Args:
        largest: For each text, the maxima of the features that were listed, which are the largest there are.
        count: How many would be listed, where so many fire.
        limit: The most to look at.
    """
    most: dict[int, float] = {}
    for maxima in largest:
        for feature, value in maxima.items():
            most[feature] = max(value, most.get(feature, 0.0))
    order = sorted(most, key=lambda feature: (-most[feature], feature))
    unlisted = [min(maxima.values()) for maxima in largest if len(maxima) == count]
    return order[:limit], max([0.0, *unlisted, *(most[feature] for feature in order[limit:])])


def _ranked(features: list[ActiveFeature]) -> list[ActiveFeature]:
    """Those of one text as they are; those of two by how far apart their maxima are, without those that are not."""
    apart = [
        feature
        for feature in features
        if feature.difference is None or abs(feature.difference) > _ROUNDING * max(on.max for on in feature.on)
    ]
    return sorted(apart, key=lambda feature: -abs(feature.difference or 0.0))


def _feature(feature: int, place: int, read: list[list[dict[str, Any]]], labels: Labels) -> ActiveFeature:
    known = labels.get(feature)
    on = []
    for summaries, per_token in read:
        summary = summaries["summary"][place]
        token = per_token["positions"].index(summary["argmax"])
        on.append(OnText(max=summary["max"], mean=summary["mean"], fired=summary["fired"], token=token))
    return ActiveFeature(
        feature=feature,
        label=known.label if known is not None else None,
        reference_max=known.reference_max if known is not None else None,
        difference=on[1].max - on[0].max if len(on) > 1 else None,
        on=on,
    )


async def _read(
    request: Request, service: SteeringService, body: ActivationsRequest, readings: list[dict[str, Any]]
) -> list[list[dict[str, Any]]] | Response:
    """The readings of each text, or the error that the request for them was answered with."""
    sae = {"sae": body.sae, "positions": "all"}
    asked = {
        "model": service.model_names[0],
        "prompt": body.all(),
        "max_tokens": 1,
        "temperature": 0,
        "steering": {"readings": [sae | reading for reading in readings]},
    }
    status, answer = await post_json(request, "/v1/completions", asked)
    if status != 200:
        return _error(status, answer.get("error", {}), body)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["steering"]["readings"] for choice in choices]


def _error(status: int, error: dict[str, Any], body: ActivationsRequest) -> Response:
    """The same error, with the fields of this route in the place of those that were sent for it."""
    param, code = str(error.get("param") or ""), str(error.get("code") or "")
    if param.startswith("steering"):
        mine = _READING.sub("", param) or "sae"
    elif param.startswith("prompt[") and body.texts is not None:
        mine = param.replace("prompt", "texts", 1)
    else:  # too long, or without a token: vLLM and the embedded server have their own fields for it
        mine = "texts" if body.text is None else "text"
    content = error_json(
        str(error.get("message") or "The text could not be read."),
        status=status,
        param=mine if param else None,
        code=code if code and not code.isdigit() else "invalid_request",  # vLLM's is the status
    )
    headers = {"Retry-After": "1"} if status == 429 else {}
    return Response(content, status, headers, "application/json")
