"""From a request's model name and ``steering`` field to the program that runs: never to less than was asked."""

import asyncio
import re
from collections.abc import Iterator

from sae_steer.compiler import compile_program
from sae_steer.errors import DuplicateEdit, RequestError, StartError, SteerError
from sae_steer.program import Program
from sae_steer.schema import Profile, Steering, parse_steering
from sae_steer_http.errors import ModelNotFound
from sae_steer_http.service import SteeringService

_PROFILE_PATH = re.compile(r"\bsteering\.profiles\[(\d+)\]")


def model_ids(service: SteeringService) -> Iterator[str]:
    """Every name that ``model`` may have: the served names, and each of them with each profile."""
    yield from service.model_names
    for profile in service.catalog.profile_names():
        yield from (f"{name}:{profile}" for name in service.model_names)


def profile_of(service: SteeringService, model: str) -> str | None:
    """The profile that a model's name means, or None for the model itself; raises :class:`ModelNotFound`."""
    names = service.model_names
    # Matched against the list, never taken apart: a model's own name may hold a colon.
    meant = [p for p in service.catalog.profile_names() if any(model == f"{name}:{p}" for name in names)]
    if model in names and not meant:
        return None
    if len(meant) == 1 and model not in names:
        return meant[0]
    if meant:
        # A profile that came into the folder after the start: neither reading is what the other one asks for.
        raise RequestError(
            f"model: {model!r} is the name of more than one thing here: {', '.join(meant)}. Rename the profile, or "
            "send it in steering.profiles.",
            param="model",
            code="ambiguous_model",
        )
    raise ModelNotFound(f"There is no model {model!r}. GET /v1/models lists those there are.", param="model")


def merge_steering(service: SteeringService, steering: Steering, model: str) -> Steering:
    """What a request asks by its model's name and its ``steering`` field: the model's profile comes first.

    Raises:
        ModelNotFound: The model is not served.
        RequestError: The model's name is ambiguous, or its profile is in ``steering`` as well.
    """
    profile = profile_of(service, model)
    if profile is None:
        return steering
    if profile in steering.profiles:
        at = steering.profiles.index(profile)
        param = f"steering.profiles[{at}]"
        raise DuplicateEdit(f"{param}: the model {model!r} has this profile already; leave it out.", param=param)
    return steering.model_copy(update={"profiles": [profile, *steering.profiles]})


def compile_steering(service: SteeringService, steering: Steering, model: str) -> Program | None:
    """Compiles what a request asks by its model's name and its ``steering`` field.

    Raises:
        ModelNotFound: The model is not served.
        RequestError: Something cannot be honoured; ``param`` is a path into the client's own body.
    """
    merged = merge_steering(service, steering, model)
    try:
        return _compile(service, merged)
    except SteerError as error:
        if merged is steering:
            raise
        # The compiler counted the model's profile as the first of the list, which the client never wrote.
        error.message = _as_written(error.message)
        error.param = _as_written(error.param) if error.param is not None else None
        raise


async def compile_aside(service: SteeringService, steering: Steering, model: str) -> Program | None:
    """:func:`compile_steering` in a thread, where there is more to do than to see that nothing is asked.

    A profile is read from disk, and so is its calibration, of which a program takes tens of thousands of numbers.
    """
    if not steering.profiles and not steering.interventions and model in service.model_names:
        return compile_steering(service, steering, model)

    def compiled() -> Program | None:
        program = compile_steering(service, steering, model)
        if program is not None:
            _ = program.digest  # which is kept
        return program

    return await asyncio.to_thread(compiled)


def _as_written(text: str) -> str:
    def path(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"steering.profiles[{number - 1}]" if number else "model"

    return _PROFILE_PATH.sub(path, text)


def _compile(service: SteeringService, steering: Steering) -> Program | None:
    return compile_program(
        steering,
        service.catalog,
        service.capabilities,
        service.limits,
        sites=service.sites,
        bos_token_id=service.bos_token_id,
    )


def check_profile(service: SteeringService, profile: Profile) -> None:
    """Compiles a profile that is not stored yet; raises :class:`RequestError` with a path into the profile."""
    taken = _taken(service, profile.name)
    if taken is not None:
        raise RequestError(f"name: the model {taken!r} is served already.", param="name", code="ambiguous_model")
    for name, fingerprint in profile.saes.items():
        have = service.catalog.sae(name, param=f"saes.{name}").sae.fingerprint
        if have != fingerprint:
            raise RequestError(
                f"saes.{name}: the profile was made for {fingerprint}, and this server has {have}.",
                param=f"saes.{name}",
                code="fingerprint_mismatch",
            )
    try:
        _compile(service, parse_steering({"interventions": profile.interventions}))
    except SteerError as error:
        error.message = error.message.replace("steering.interventions", "interventions")
        error.param = error.param.removeprefix("steering.") if error.param is not None else None
        raise


def _taken(service: SteeringService, profile: str) -> str | None:
    """The served model, if there is one, whose name a profile's model would have."""
    names = service.model_names
    return next((name for name in names if name in [f"{base}:{profile}" for base in names]), None)


def check_profiles(service: SteeringService) -> None:
    """Refuses the start over a stored profile that could not be used, or whose model name is taken."""
    for profile in service.catalog.profile_names():
        taken = _taken(service, profile)
        if taken is not None:
            raise StartError(f"Profile {profile!r} would be the model {taken!r}, which is served already. Rename one.")
        try:
            _compile(service, parse_steering({"profiles": [profile]}))
        except RequestError as error:
            message = error.message.removeprefix("steering.profiles[0]: ").replace("steering.profiles[0].", "")
            raise StartError(f"Profile {profile!r} cannot be used: {message}") from None
