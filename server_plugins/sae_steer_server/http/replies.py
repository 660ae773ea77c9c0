"""What the server answers, in OpenAI's form; ``steering`` is there for steered requests only."""

from typing import Literal

from sae_steer_http.replies import ChoiceSteering, ProgramSummary, Reply


class Usage(Reply):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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


class Health(Reply):
    """Whether the engine lives."""

    status: Literal["ok", "down"]
