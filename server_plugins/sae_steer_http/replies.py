"""What every host answers alike: errors, and what steering did."""

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """Base of all answers. Fields that were not set are not sent."""

    model_config = ConfigDict(extra="forbid")

    def encode(self) -> bytes:
        """As JSON."""
        return self.model_dump_json(exclude_unset=True).encode()


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(Reply):
    """Any answer that is not a success."""

    error: ErrorDetail


class ProgramSummary(Reply):
    """Which program steered the answer."""

    program: str = Field(description="Content hash of the program.")


class AppliedFeature(Reply):
    """What happened to one edited feature, or along one plain vector, over the request's tokens."""

    site: str
    sae: str | None = None
    feature: int | None = None
    vector: str | None = None
    op: str
    tokens: int = Field(description="Tokens on which the edit held by position and token id.")
    fired: int = Field(description="Tokens on which it changed the feature.")
    mean_before: float
    mean_after: float


class AppliedDose(Reply):
    """|sum of deltas| / |x|, over the touched tokens."""

    max: float
    mean: float
    limited: int = Field(description="Tokens beyond the limit.")


class Applied(Reply):
    """What steering did to one choice."""

    sites: list[str]
    features: list[AppliedFeature]
    tokens: int
    fired: int
    dose: AppliedDose


class ChoiceSteering(Reply):
    """Steering's block of one choice."""

    applied: Applied
