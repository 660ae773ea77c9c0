"""What the routes that list things answer: models, SAEs, features, profiles, capabilities."""

from typing import Any, Literal

from pydantic import Field

from sae_steer_http.replies import Reply


class Model(Reply):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Reply):
    """The served models."""

    object: Literal["list"]
    data: list[Model]


class SaeEntry(Reply):
    """A loaded SAE."""

    id: str
    site: str
    architecture: str
    features: int
    width: int
    whole: bool = Field(description="Whether its whole dictionary is held, as `top_k` readings need.")
    fingerprint: str


class SaeList(Reply):
    """The loaded SAEs."""

    data: list[SaeEntry]


class FeatureEntry(Reply):
    """A labelled feature."""

    sae: str
    feature: int
    label: str | None
    reference_max: float | None


class FeatureList(Reply):
    """Labelled features."""

    data: list[FeatureEntry]


class CalibrationEntry(Reply):
    """What a profile's calibration offers to `app`, and to `mask_range`, `gain` and `ablate`."""

    sae: str
    site: str
    concepts: list[str] = Field(description="Which may be asked for.")
    labels: list[str] = Field(description="What it was told apart from.")


class ProfileEntry(Reply):
    """A stored profile, shortly."""

    name: str
    description: str
    interventions: int
    calibration: CalibrationEntry | None = Field(default=None, description="Where it holds one.")
    error: str | None = Field(default=None, description="Why it cannot be used, where it cannot.")


class ProfileList(Reply):
    """The stored profiles."""

    data: list[ProfileEntry]


class Deleted(Reply):
    """A profile that is no more."""

    name: str
    deleted: Literal[True]


class Capability(Reply):
    """What this server can do, or why not."""

    key: str
    what: str
    supported: bool
    why: str | None
    instead: str | None


class CapabilityList(Reply):
    """What this server can do, and how much of it."""

    host: str
    data: list[Capability]
    limits: dict[str, Any]
