"""``GET /v1/models``: the model, and the model with each profile."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from sae_steer_http.catalog_replies import Model, ModelList
from sae_steer_http.openapi import errors
from sae_steer_http.steering import model_ids, profile_of
from sae_steer_server.state import ServerState, state_of

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses={200: {"model": ModelList}, **errors(401)})
async def list_models(request: Request) -> Response:
    """Every name that ``model`` may have."""
    state = state_of(request)
    models = [_model(state, name) for name in model_ids(state.steering)]
    return Response(ModelList(object="list", data=models).encode(), media_type="application/json")


# A hub id has a slash, so the rest of the path is the name.
@router.get("/{model_id:path}", responses={200: {"model": Model}, **errors(401, 404)})
async def get_model(request: Request, model_id: str) -> Response:
    """One of them."""
    state = state_of(request)
    profile_of(state.steering, model_id)
    return Response(_model(state, model_id).encode(), media_type="application/json")


def _model(state: ServerState, name: str) -> Model:
    return Model(id=name, object="model", created=state.created, owned_by="sae-steer")
