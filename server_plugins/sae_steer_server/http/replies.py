"""What the server answers, in OpenAI's form; ``steering`` is there for steered requests only."""

from typing import Literal

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


class Usage(Reply):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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


class TopLogprob(Reply):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A sampled token with those that were likely beside it."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """The log-probabilities of a chat choice."""

    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(Reply):
    """The generated message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class _Choice(Reply):
    index: int
    finish_reason: Literal["stop", "length"]
    steering: ChoiceSteering | None = None


class ChatChoice(_Choice):
    """One generated message."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class CompletionLogprobs(Reply):
    """The log-probabilities of a completion: four lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Choice):
    """One generated text."""

    text: str
    logprobs: CompletionLogprobs | None


class _Answer(Reply):
    id: str
    created: int
    model: str
    system_fingerprint: None = None
    steering: ProgramSummary | None = None


class ChatCompletion(_Answer):
    """The answer of ``POST /v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Completion(_Answer):
    """The answer of ``POST /v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class Delta(Reply):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    """What a chunk adds to one choice; ``steering`` comes with the last."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    steering: ChoiceSteering | None = None


class CompletionChunkChoice(Reply):
    """What a chunk adds to one choice; ``steering`` comes with the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    steering: ChoiceSteering | None = None


class ChatChunk(_Answer):
    """One event of a chat stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChunk(_Answer):
    """One event of a completion stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
