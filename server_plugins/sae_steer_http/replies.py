"""What every host answers alike: errors, and what steering did."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sae_steer.program import Program


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

    program: str | None = Field(description="Content hash of the edits; null where nothing was edited.")


def edits_digest(program: Program | None) -> str | None:
    """What an answer says of its program; readings change no answer, and so are no part of it."""
    return program.edits.digest if program is not None and program.edits is not None else None


def program_headers(program: Program | None) -> dict[str, str]:
    """Headers of an answer."""
    digest = edits_digest(program)
    return {"X-Steering-Program": digest} if digest is not None else {}


class AppliedFeature(Reply):
    """What happened to one edited feature, or along one plain vector, over the request's tokens."""

    site: str
    sae: str | None = None
    feature: int | None = None
    vector: str | None = None
    fingerprint: str = Field(description="Content hash of the SAE, or of the vector.")
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


class FeatureSummary(Reply):
    """One feature over the tokens of a reading.

    In ``top_summary``, a feature counts as 0 on tokens where it was not among the largest.
    """

    feature: int
    max: float
    argmax: int | None = Field(description="Position of the maximum; null where no token was read.")
    mean: float
    last: float = Field(description="On the last token that was read.")
    fired: float = Field(description="Fraction of the tokens with a value above 0.")
    tokens: int


class ReadingReply(Reply):
    """What one reading has: lists with one entry for each token, in a stream those that are new."""

    sae: str
    site: str
    at: Literal["before", "after"]
    features: list[int]
    positions: list[int] | None = Field(None, description="Absolute positions of the tokens.")
    tokens: list[int] | None = Field(None, description="Ids of the tokens at these positions.")
    text: list[str] | None = Field(None, description="Their texts, each by itself.")
    values: list[list[float]] | None = Field(None, description="For each token, the value of each feature.")
    top: list[list[tuple[int, float]]] | None = Field(
        None, description="For each token, its largest features above 0 with their values, the largest first."
    )
    summary: list[FeatureSummary] | None = Field(None, description="Of the named features; at the end.")
    top_summary: list[FeatureSummary] | None = Field(None, description="Of those with the largest maxima; at the end.")


class TriggerReply(Reply):
    """What one trigger did."""

    sae: str
    feature: int
    above: float
    action: Literal["stop", "flag"]
    fired: int = Field(description="Tokens on which it fired.")
    first: int | None = Field(description="The first position on which it fired.")
    value: float | None = Field(description="The feature's activation there.")


class ChoiceSteering(Reply):
    """Steering's block of one choice; ``applied`` and what is counted come with its end."""

    applied: Applied | None = None
    readings: list[ReadingReply] | None = None
    triggers: list[TriggerReply] | None = None
    trigger: TriggerReply | None = Field(None, description="The trigger that ended the answer.")
