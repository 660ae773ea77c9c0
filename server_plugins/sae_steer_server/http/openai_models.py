"""Bodies of the two generation routes: OpenAI's fields, closed, each honoured or refused, none ignored.

What OpenAI knows and this server does not do is accepted at its neutral value only; ``user``, ``metadata`` and their
kind say nothing about the answer and are accepted.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sae_steer.closed import Closed
from sae_steer.schema import Steering, parse_steering

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_LOGPROBS = 20
_TYPES = {bool: "boolean", int: "number", str: "string", list: "array", dict: "object"}
_NOTHING = parse_steering({})


@dataclass(frozen=True, slots=True, eq=False)  # Annotated keeps equal metadata once, and (0,) equals (False,)
class Neutral:
    """Marks a field whose meaning is not offered: these values, which ask for nothing, pass; all others are refused.

    Args:
        values: The neutral values beside null.
    """

    values: tuple[object, ...] = ()

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # Each with its type: to some validators 0 and false are one value.
        return {"anyOf": [{"type": "null"}, *({"type": _TYPES[type(v)], "const": v} for v in self.values)]}

    def _check(self, value: object) -> object:
        # 0 == False and 1 == True in Python, and not in JSON.
        same = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values)
        if value is None or same:
            return value
        raise PydanticCustomError("unsupported", "this server does not offer it; leave the field out")


Off = Annotated[object, Neutral((False,))]
Zero = Annotated[object, Neutral((0,))]
Empty = Annotated[object, Neutral(([],))]
Absent = Annotated[object, Neutral()]


def _form(value: object) -> str:
    """Tag of a union between text and the kinds of list; the tags start with ~, which tells them from field names."""
    if isinstance(value, str):
        return "~text"
    first = value[0] if isinstance(value, list) and value else None
    match first:
        case str():
            return "~parts"
        case list():
            return "~token_lists"
        case _:
            return "~tokens" if isinstance(value, list) else "~text"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Text = Annotated[str, Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("~parts")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("~tokens")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
        Tag("~token_lists"),
    ],
    Discriminator(_form),
]
Stop = Annotated[
    Annotated[_Text, Tag("~text")] | Annotated[list[_Text], Field(min_length=1, max_length=4), Tag("~parts")],
    Discriminator(lambda value: "~text" if isinstance(value, str) else "~parts"),
]


class TextPart(Closed):
    """A piece of a message; text is the only kind this server takes."""

    type: Literal["text"]
    text: str


class Message(Closed):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("~text")] | Annotated[list[TextPart], Field(min_length=1), Tag("~parts")],
        Discriminator(lambda value: "~text" if isinstance(value, str) else "~parts"),
    ]
    name: str | None = None
    # An OpenAI client that sends an answer back as a message sends these along.
    refusal: Absent = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: Empty = None
    annotations: Empty = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Closed):
    """How a stream is sent."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    include_obfuscation: Off = None


class GenerationRequest(Closed):
    """What both generation routes take."""

    model: Annotated[str, Field(min_length=1, description="A served model, or <model>:<profile>.")]
    steering: Steering = Field(_NOTHING, description="What to do to the model's features in this request.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens, as vLLM does under this name.")

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Off = None

    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[object, Neutral(({},))] = None

    @model_validator(mode="after")
    def _stream_options_with_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for streams: set 'stream' to true, or leave it out")
        return self


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    tools: Empty = None
    tool_choice: Annotated[object, Neutral(("none", "auto"))] = None
    parallel_tool_calls: Annotated[object, Neutral((True, False))] = None
    functions: Empty = None
    function_call: Annotated[object, Neutral(("none", "auto"))] = None
    response_format: Annotated[object, Neutral(({"type": "text"},))] = None
    modalities: Annotated[object, Neutral((["text"],))] = None
    audio: Absent = None
    prediction: Absent = None
    reasoning_effort: Annotated[object, Neutral(("none",))] = None
    service_tier: Annotated[object, Neutral(("auto", "default"))] = None
    verbosity: Absent = None
    web_search_options: Absent = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are one limit under two names; give one of them")
        return self


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: Off = None
    suffix: Absent = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("'best_of' other than 'n' is not offered; ask for several choices with 'n'")
        return self
