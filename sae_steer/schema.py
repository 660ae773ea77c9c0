"""What a user may send: the ``steering`` field, closed and strict.

The models here say what is well formed; whether the names exist and the numbers fit is the compiler's business. Numbers
must be JSON numbers (no strings, no booleans), finite, and every unknown key is an error, so that a typing mistake can
never turn into a request that is not steered as asked.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sae_steer.calibration.info import CalibrationInfo
from sae_steer.closed import MAX_FEATURES, Closed, Name
from sae_steer.errors import SchemaError

MAX_INTERVENTIONS = 256
MAX_RANGES = 64
MAX_READINGS = 8
MAX_TRIGGERS = 16
MAX_READ_FEATURES = 1024
"""Features that one request may have read by name."""
MAX_TOP_K = 128

FeatureId = Annotated[int, Field(ge=0, lt=2**31, description="Number of a feature in its SAE, from 0.")]
PositionIndex = Annotated[int, Field(ge=0, lt=2**31)]
LARGEST = 1e12
"""Largest value of an edit: no product of two such numbers overflows float32 before the dose limit sees it."""

Value = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Values = Annotated[
    Annotated[Value, Tag("~number")]
    | Annotated[list[Value], Field(min_length=1, max_length=MAX_FEATURES), Tag("~list")],
    Discriminator(lambda value: "~list" if isinstance(value, list) else "~number"),
    Field(description="One number, or one per feature."),
]


class When(Closed):
    """A gate on an edit: a feature of an SAE at the same site on the same token, the token's id, or both."""

    sae: Name | None = None
    feature: FeatureId | None = None
    above: Value | None = Field(None, description="The edit holds where the feature is strictly above this.")
    below: Value | None = Field(None, description="The edit holds where the feature is strictly below this.")
    token_in: Annotated[list[PositionIndex], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="The edit holds on tokens with one of these ids."
    )

    @model_validator(mode="after")
    def _complete(self) -> "When":
        named = self.sae is not None, self.feature is not None
        bounded = self.above is not None or self.below is not None
        if any(named) or bounded:
            if not (all(named) and bounded):
                raise ValueError("a gate by a feature needs 'sae', 'feature' and at least one of 'above' and 'below'")
        elif self.token_in is None:
            raise ValueError("an empty gate: give 'sae', 'feature' and 'above' or 'below', or give 'token_in'")
        return self


class Ranges(Closed):
    """Half-open ranges of absolute token positions."""

    ranges: Annotated[
        list[Annotated[list[PositionIndex], Field(min_length=2, max_length=2)]],
        Field(min_length=1, max_length=MAX_RANGES),
    ]

    @model_validator(mode="after")
    def _ordered(self) -> "Ranges":
        for start, end in self.ranges:
            if start >= end:
                raise ValueError(
                    f"the range [{start}, {end}] is empty: ranges are half-open, [start, end) with start < end"
                )
        return self


Positions = Annotated[
    Annotated[Literal["all", "prompt", "completion"], Tag("~phase")] | Annotated[Ranges, Tag("~ranges")],
    Discriminator(lambda value: "~ranges" if isinstance(value, dict | Ranges) else "~phase"),
]


class _Edit(Closed):
    """What every intervention may say."""

    when: When | None = None
    positions: Positions = Field(
        "all",
        description="'completion' starts at the last prompt token, whose output predicts the first completion token.",
    )
    skip_bos: bool = Field(False, description="Leave beginning-of-sequence tokens alone.")


class _FeatureEdit(_Edit):
    sae: Name
    features: Annotated[list[FeatureId], Field(min_length=1, max_length=MAX_FEATURES)]


class FeatureValueEdit(_FeatureEdit):
    """``clamp``: f' = v. ``add``: f' = f + v. ``floor``: f' = max(f, v). ``cap``: f' = min(f, v)."""

    op: Literal["clamp", "add", "floor", "cap"]
    value: Values
    units: Literal["raw", "reference_max", "residual_norm"] = Field(
        "raw",
        description="What the value is a multiple of: the SAE file's own unit, the feature's recorded maximum, or the "
        "length of the token's residual.",
    )


class FeatureScaleEdit(_FeatureEdit):
    """``scale`` and ``gain``: f' = v f."""

    op: Literal["scale", "gain"]
    value: Values


class FeatureAblateEdit(_FeatureEdit):
    """``ablate``: f' = 0."""

    op: Literal["ablate"]


class FeatureMaskEdit(_FeatureEdit):
    """``mask_range``: f' = 0 where lo <= f <= hi."""

    op: Literal["mask_range"]
    lo: Value
    hi: Value

    @model_validator(mode="after")
    def _ordered(self) -> "FeatureMaskEdit":
        if self.lo > self.hi:
            raise ValueError(f"'lo' ({self.lo}) is above 'hi' ({self.hi})")
        return self


class _CalibratedEdit(_Edit):
    """An edit of the features that a calibration has chosen for a concept, the best ``top`` of them."""

    sae: Name
    calibration: Name
    concept: Annotated[str, Field(min_length=1, max_length=128)]
    top: Annotated[int, Field(ge=1, le=MAX_FEATURES)] | None = None


class CalibratedAblateEdit(_CalibratedEdit):
    """``ablate`` by a calibration: f' = 0 for the features of a concept."""

    op: Literal["ablate"]


class CalibratedGainEdit(_CalibratedEdit):
    """``gain`` by a calibration: f' = g f, with g = 1 - 2 (AUROC - 1/2) where that is below 1 (AURA), or a constant."""

    op: Literal["gain"]
    value: Value | None = Field(None, description="One gain for all features (dampening); left out = AURA's.")


class CalibratedMaskEdit(_CalibratedEdit):
    """``mask_range`` by a calibration: f' = 0 within some standard deviations of the concept's mean activation."""

    op: Literal["mask_range"]
    sigmas: Annotated[float, Field(ge=0, le=1e6)] = 2.0


class AppEdit(_CalibratedEdit):
    """``app``: f' = f (1 - P(concept given f))^strength, from a calibration."""

    op: Literal["app"]
    strength: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    prior: Literal["uniform", "target", "empirical"] = "uniform"


class _VectorEdit(_Edit):
    site: Annotated[str, Field(min_length=3, max_length=64, description="A place such as resid_post.12.")]
    vector: Name


class VectorValueEdit(_VectorEdit):
    """``add``: y' = y + v d. ``clamp``, ``floor``, ``cap`` act on the projection onto the unit direction."""

    op: Literal["add", "clamp", "floor", "cap"]
    value: Value
    units: Literal["raw", "residual_norm"] = "raw"


class VectorScaleEdit(_VectorEdit):
    """``scale``: the projection onto the unit direction times v."""

    op: Literal["scale"]
    value: Value


class VectorAblateEdit(_VectorEdit):
    """``ablate``: the projection onto the unit direction is removed."""

    op: Literal["ablate"]


_TAGS = {
    "clamp": "value",
    "add": "value",
    "floor": "value",
    "cap": "value",
    "scale": "scale",
    "gain": "scale",
    "ablate": "ablate",
    "mask_range": "mask",
    "app": "app",
}
_CALIBRATED = ("ablate", "gain", "mask_range")


def _variant(value: Any) -> str | None:
    """Which model describes an intervention: decided by its op, and by whether it names a vector or a calibration."""
    op = value.get("op") if isinstance(value, dict) else getattr(value, "op", None)
    if not isinstance(op, str) or op not in _TAGS:
        return None

    def has(key: str) -> bool:
        return key in value if isinstance(value, dict) else hasattr(value, key)

    calibrated = op == "app" or (op in _CALIBRATED and has("calibration"))
    return f"~{'vector' if has('vector') else 'calibrated' if calibrated else 'feature'}-{_TAGS[op]}"


Intervention = Annotated[
    Annotated[FeatureValueEdit, Tag("~feature-value")]
    | Annotated[FeatureScaleEdit, Tag("~feature-scale")]
    | Annotated[FeatureAblateEdit, Tag("~feature-ablate")]
    | Annotated[FeatureMaskEdit, Tag("~feature-mask")]
    | Annotated[CalibratedAblateEdit, Tag("~calibrated-ablate")]
    | Annotated[CalibratedGainEdit, Tag("~calibrated-scale")]
    | Annotated[CalibratedMaskEdit, Tag("~calibrated-mask")]
    | Annotated[AppEdit, Tag("~calibrated-app")]
    | Annotated[VectorValueEdit, Tag("~vector-value")]
    | Annotated[VectorScaleEdit, Tag("~vector-scale")]
    | Annotated[VectorAblateEdit, Tag("~vector-ablate")],
    Discriminator(
        _variant,
        custom_error_type="unknown_op",
        custom_error_message="'op' must be one of clamp, add, scale, ablate, floor, cap, mask_range, gain, app; "
        "a 'vector' takes add, clamp, scale, ablate, floor, cap; a 'calibration' takes app, mask_range, gain, ablate",
    ),
]


class Dose(Closed):
    """A limit on |sum of deltas| / |x| per token and site."""

    limit: Annotated[float, Field(gt=0, le=1e6)]
    on_dose: Literal["fail", "scale"] = Field(
        "fail",
        description="End the request with an error, or scale that token's delta down to the limit and report it.",
    )


class Readings(Closed):
    """Which activations of one SAE to send back."""

    sae: Name
    features: Annotated[list[FeatureId], Field(max_length=MAX_READ_FEATURES)] = Field(default_factory=list)
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K, description="Beside these, so many largest of each token.")] = 0
    positions: Positions = "completion"
    at: Literal["before", "after"] = Field(
        "before", description="Before the edits of the site, or after them: then edited features have their new value."
    )
    per_token: bool = Field(True, description="Send every token's values, and not the summary alone.")

    @model_validator(mode="after")
    def _reads(self) -> "Readings":
        if not self.features and not self.top_k:
            raise ValueError("nothing is read: name 'features', or give a 'top_k' above 0")
        if len(set(self.features)) != len(self.features):
            raise ValueError("one of the 'features' is named twice")
        return self


class Trigger(Closed):
    """Acts on the request when a feature passes a threshold."""

    sae: Name
    feature: FeatureId
    above: Value
    action: Literal["stop", "flag"]


class Steering(Closed):
    """The ``steering`` field of a request."""

    profiles: Annotated[list[Name], Field(max_length=16)] = Field(default_factory=list)
    interventions: Annotated[list[Intervention], Field(max_length=MAX_INTERVENTIONS)] = Field(default_factory=list)
    override: bool = Field(False, description="The request's edits replace a profile's edits of the same features.")
    error: Literal["keep", "drop"] = Field(
        "keep", description="Keep the SAE's reconstruction error (edit by delta), or write the decoded features alone."
    )
    dose: Dose | None = None
    readings: (
        Annotated[
            Annotated[Readings, Tag("~one")]
            | Annotated[list[Readings], Field(min_length=1, max_length=MAX_READINGS), Tag("~many")],
            Discriminator(lambda value: "~many" if isinstance(value, list) else "~one"),
        ]
        | None
    ) = None
    on: Annotated[list[Trigger], Field(max_length=MAX_TRIGGERS)] = Field(default_factory=list)


class ProfileBody(Closed):
    """A named set of interventions, as a client may store it."""

    name: Name
    description: Annotated[str, Field(max_length=4096)] = ""
    interventions: Annotated[list[Intervention], Field(min_length=1, max_length=MAX_INTERVENTIONS)]
    saes: dict[Name, str] = Field(
        default_factory=dict, description="Fingerprints of the SAEs it was made for, by name; a mismatch is refused."
    )


class Profile(ProfileBody):
    """A stored profile: the file ``profile.json`` of its folder. A calibration is never a client's."""

    calibration: CalibrationInfo | None = Field(
        None, description="What `app` and its rivals find by this profile's name; made by `sae-steer calibrate`."
    )


_STEERING = TypeAdapter(Steering)
_PROFILE = TypeAdapter(Profile)
_PROFILE_BODY = TypeAdapter(ProfileBody)


def json_path(root: str, fault: ErrorDetails) -> str:
    """``steering.interventions[0].value`` from a fault's location; tags of unions start with ~ and are left out."""
    location = fault["loc"]
    unknown = fault["type"] == "extra_forbidden"  # then the last part is the client's own word
    path = root
    for i, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("~") or (unknown and i == len(location) - 1):
            path = f"{path}.{part}" if path else part
    return path


def schema_error(error: ValidationError, root: str) -> SchemaError:
    """The first fault of a validation, as one of our errors with its JSON path."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    path = json_path(root, first)
    code = (
        "unknown_op"
        if first["type"] == "unknown_op"
        else "unknown_field"
        if first["type"] == "extra_forbidden"
        else None
    )
    more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return SchemaError(f"{path}: {first['msg']}{more}", param=path, code=code)


def parse_steering(value: object, *, root: str = "steering") -> Steering:
    """Validates the ``steering`` field from parsed JSON; raises :class:`SchemaError` with the JSON path at fault."""
    try:
        return _STEERING.validate_python(value)
    except ValidationError as error:
        raise schema_error(error, root) from None


def parse_profile(value: object, *, root: str = "profile") -> Profile:
    """Validates a profile from parsed JSON; raises :class:`SchemaError`."""
    try:
        return _PROFILE.validate_python(value)
    except ValidationError as error:
        raise schema_error(error, root) from None


def parse_profile_body(value: object) -> Profile:
    """Validates a profile that a client sends; raises :class:`SchemaError`, also for one that brings a calibration."""
    if isinstance(value, dict) and value.get("calibration") is not None:
        raise SchemaError(
            "calibration: no client may send one. Run `sae-steer calibrate` where the server's folder of profiles is.",
            param="calibration",
            code="unknown_field",
        )
    try:
        body = _PROFILE_BODY.validate_python(value)
    except ValidationError as error:
        raise schema_error(error, "") from None
    return Profile(**dict(body))


def steering_json_schema() -> dict[str, Any]:
    """The published JSON Schema of the ``steering`` field."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_STEERING.json_schema()}
