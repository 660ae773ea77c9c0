"""``/v1/steering``: what a request may name, what the server can honour, and the profiles."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from sae_steer.catalog import Catalog
from sae_steer.errors import Forbidden, RequestError, Unauthorized
from sae_steer.sae import FeatureLabel, Labels
from sae_steer.schema import (
    MAX_READ_FEATURES,
    MAX_TOP_K,
    Profile,
    ProfileBody,
    parse_profile_body,
    steering_json_schema,
)
from sae_steer_http import ADMIN_HEADER
from sae_steer_http.bodies import read_json
from sae_steer_http.catalog_replies import (
    CalibrationEntry,
    Capability,
    CapabilityList,
    Deleted,
    FeatureEntry,
    FeatureList,
    ProfileEntry,
    ProfileList,
    SaeEntry,
    SaeList,
)
from sae_steer_http.errors import FeatureNotFound, ProfileNotFound, SaeNotFound
from sae_steer_http.openapi import admin_security, errors, request_body
from sae_steer_http.replies import Reply
from sae_steer_http.security import same_key
from sae_steer_http.service import SteeringService, service_of
from sae_steer_http.steering import check_profile

router = APIRouter(prefix="/v1/steering", tags=["steering"])


class FeatureQuery(BaseModel):
    """What to search for."""

    model_config = ConfigDict(extra="forbid")

    sae: Annotated[str, Field(description="Name of an SAE; left out = all of them.")] | None = None
    q: Annotated[
        str, Field(max_length=256, description="Words of a label, or a number; left out = all with a label.")
    ] = ""
    limit: Annotated[int, Field(ge=1, le=1000)] = 20
    ids: (
        Annotated[
            str,
            Field(
                pattern=r"^[0-9]{1,9}(,[0-9]{1,9}){0,127}$",
                description="Instead of words: numbers of features, with commas between them.",
            ),
        ]
        | None
    ) = None


@router.get("/saes", responses={200: {"model": SaeList}, **errors(401)})
async def saes(request: Request) -> Response:
    """The loaded SAEs."""
    entries = [
        SaeEntry(
            id=entry.name,
            site=str(entry.site),
            architecture=entry.sae.spec.architecture,
            features=entry.sae.spec.n_features,
            width=entry.sae.spec.d_in,
            whole=entry.whole,
            fingerprint=entry.sae.fingerprint,
        )
        for entry in service_of(request).catalog.saes.values()
    ]
    return _json(SaeList(data=entries))


@router.get("/features", responses={200: {"model": FeatureList}, **errors(400, 401, 404)})
async def features(request: Request, query: Annotated[FeatureQuery, Query()]) -> Response:
    """Features whose label contains every word of a text, in any case, the best first; a number finds that feature."""
    catalog = service_of(request).catalog
    if query.sae is not None and query.sae not in catalog.saes:
        raise SaeNotFound(f"There is no SAE {query.sae!r}. GET /v1/steering/saes lists those there are.", param="sae")
    if query.ids is not None:
        labels = _described(catalog, query)
    else:
        labels = await asyncio.to_thread(catalog.search_features, query.sae, query.q, query.limit)
    found = [
        FeatureEntry(sae=name, feature=label.feature, label=label.label, reference_max=label.reference_max)
        for name, label in labels
    ]
    return _json(FeatureList(data=found))


def _described(catalog: Catalog, query: FeatureQuery) -> list[tuple[str, FeatureLabel]]:
    """The features that ``ids`` names, in its order, of one SAE or of each; raises :class:`FeatureNotFound`."""
    entries = [catalog.saes[query.sae]] if query.sae is not None else list(catalog.saes.values())
    wanted = [int(feature) for feature in (query.ids or "").split(",")]
    most = max((entry.sae.spec.n_features for entry in entries), default=0)
    missing = next((feature for feature in wanted if feature >= most), None)
    if missing is not None:
        raise FeatureNotFound(f"ids: there is no feature {missing}; the last one is {most - 1}.", param="ids")
    found: list[tuple[str, FeatureLabel]] = []
    for entry in entries:
        labels = entry.labels if entry.labels is not None else Labels({})
        mine = [feature for feature in wanted if feature < entry.sae.spec.n_features]
        found += [(entry.name, labels.get(feature) or FeatureLabel(feature, None, None)) for feature in mine]
    return found


@router.get("/capabilities", responses={200: {"model": CapabilityList}, **errors(401)})
async def capabilities(request: Request) -> Response:
    """What this server can honour, and what to do instead of what it cannot."""
    service = service_of(request)
    limits = {
        "max_programs": service.limits.max_programs,
        "max_wide_programs": service.limits.wide_programs,
        "max_ordinary_edits_per_site": service.limits.rows,
        "max_edits": service.limits.max_edits,
        "max_edits_per_site": service.limits.widest,
        "max_reading_values": service.limits.max_reading_values,
        "max_read_features": MAX_READ_FEATURES,
        "max_top_k": MAX_TOP_K,
        "max_body_bytes": service.max_body_bytes,
        **service.host_limits,
    }
    rows = [Capability(**row) for row in service.capabilities.table()]
    return _json(CapabilityList(host=service.capabilities.host, data=rows, limits=limits))


@router.get("/schema", responses={200: {"model": dict[str, Any]}, **errors(401)})
async def schema() -> Response:
    """The JSON Schema of the field ``steering``."""
    return JSONResponse(steering_json_schema())


async def admin(request: Request) -> SteeringService:
    """The service, for who has the admin key; raises :class:`Unauthorized`, or :class:`Forbidden` if there is none."""
    service = service_of(request)
    key = service.admin_key
    if key is None:
        raise Forbidden("Nothing can change this server: it was started without an admin key.")
    if not same_key(request.headers.get(ADMIN_HEADER, ""), key):
        raise Unauthorized(f"The admin key is missing or wrong. Send it in the header {ADMIN_HEADER}.")
    return service


Admin = Annotated[SteeringService, Depends(admin)]
ProfileName = Annotated[str, Path(max_length=128)]


@router.get("/profiles", responses={200: {"model": ProfileList}, **errors(400, 401)})
async def profiles(request: Request) -> Response:
    """The stored profiles."""
    catalog = service_of(request).catalog
    return _json(ProfileList(data=[_entry(catalog, name) for name in catalog.profile_names()]))


def _entry(catalog: Catalog, name: str) -> ProfileEntry:
    """A profile in the list; one that is broken hides no other."""
    try:
        profile = catalog.profile(name)
    except RequestError as error:
        return ProfileEntry(name=name, description="", interventions=0, error=error.message)
    entry = ProfileEntry(name=name, description=profile.description, interventions=len(profile.interventions))
    info = profile.calibration
    if info is not None:
        entry.calibration = CalibrationEntry(sae=info.sae, site=info.site, concepts=info.concepts, labels=info.labels)
    return entry


@router.get("/profiles/{name}", responses={200: {"model": Profile}, **errors(400, 401, 404)})
async def get_profile(request: Request, name: ProfileName) -> Response:
    """A stored profile."""
    return _profile(_stored(service_of(request), name))


@router.put(
    "/profiles/{name}",
    responses={200: {"model": Profile}, **errors(400, 401, 413)},
    openapi_extra=request_body(ProfileBody) | admin_security(),
)
async def put_profile(request: Request, name: ProfileName, service: Admin) -> Response:
    """Stores a profile, or replaces it, once it was shown to compile. Requests that run keep what they began with."""
    profile = parse_profile_body(await read_json(request, service.max_body_bytes))
    if profile.name != name:
        raise RequestError(f"name: the profile is called {profile.name!r}, and the address {name!r}.", param="name")
    check_profile(service, profile)
    await asyncio.to_thread(service.catalog.put_profile, profile)
    return _profile(profile)


@router.delete(
    "/profiles/{name}",
    responses={200: {"model": Deleted}, **errors(400, 401, 404)},
    openapi_extra=admin_security(),
)
async def delete_profile(name: ProfileName, service: Admin) -> Response:
    """Removes a profile. Requests that run keep it."""
    _require_name(service, name)
    await asyncio.to_thread(service.catalog.delete_profile, name)
    return _json(Deleted(name=name, deleted=True))


def _require_name(service: SteeringService, name: str) -> None:
    if name not in service.catalog.profile_names():
        raise ProfileNotFound(f"There is no profile {name!r}. GET /v1/steering/profiles lists them.", param="name")


def _stored(service: SteeringService, name: str) -> Profile:
    _require_name(service, name)
    return service.catalog.profile(name)


def _profile(profile: Profile) -> Response:
    return Response(profile.model_dump_json(exclude_defaults=True), media_type="application/json")


def _json(reply: Reply) -> Response:
    return Response(reply.encode(), media_type="application/json")
