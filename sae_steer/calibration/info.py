"""What a profile says of its calibration: the block ``calibration`` of ``profile.json``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sae_steer.closed import MAX_FEATURES, Closed, Name

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class CalibrationSettings(Closed):
    """How a calibration was estimated."""

    bins: Annotated[int, Field(ge=2, le=64, description="Bins of positive activations.")]
    alpha: Annotated[float, Field(gt=0, le=1e6, description="Pseudo-counts of each concept.")]
    quantile: Annotated[float, Field(gt=0, le=1, description="Of the positive activations, where the last bin ends.")]
    smoothing: Annotated[float, Field(ge=0, le=100, description="Multiple of Scott's bandwidth.")]
    tokens: Literal["last", "all", "labelled-span"] = Field(description="Which tokens of a text are observations.")
    choice: Literal["separability", "dprime"] = Field(description="How features were ranked for a concept.")
    cap: Annotated[int, Field(ge=1, le=MAX_FEATURES, description="Most features chosen for a concept.")]


class CalibrationInfo(Closed):
    """What a calibration was made from; the numbers are in ``profile.safetensors`` beside the profile."""

    version: Literal[1] = 1
    file: Digest = Field(description="Content of profile.safetensors.")
    sae: Name
    sae_fingerprint: str
    model: str = Field(description="Fingerprint of the model.")
    site: str
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=2, max_length=4096)]
    concepts: list[str] = Field(description="The labels for which features were chosen.")
    documents: list[int] = Field(description="Texts of each label.")
    observations: list[int] = Field(description="Observations of each label.")
    never_fired: Annotated[int, Field(ge=0)] = Field(0, description="Features that fired on no observation.")
    settings: CalibrationSettings

    @model_validator(mode="after")
    def _complete(self) -> "CalibrationInfo":
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is there twice")
        if len(self.documents) != len(self.labels) or len(self.observations) != len(self.labels):
            raise ValueError("'documents' and 'observations' have one number for each label")
        if min(*self.documents, *self.observations) < 0:
            raise ValueError("a number of texts is negative")
        if not self.concepts or not set(self.concepts) <= set(self.labels):
            raise ValueError("'concepts' are some of the labels")
        return self
