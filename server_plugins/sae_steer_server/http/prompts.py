"""From what a client sent as a prompt to token ids."""

import asyncio
from typing import cast

from jinja2 import TemplateError

from sae_steer.errors import RequestError
from sae_steer_server.http.openai_models import ChatRequest, CompletionRequest
from sae_steer_server.state import ServerState


async def chat_prompt(state: ServerState, body: ChatRequest) -> list[int]:
    """The conversation through the model's chat template; raises :class:`RequestError` where it has none or refuses."""
    tokenizer = state.tokenizer
    if not tokenizer.chat_template:
        raise RequestError(
            "This model has no chat template, so how it expects messages is not known. Write the prompt out and send "
            "it to /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    messages = [
        {"role": message.role, "content": message.text} | ({"name": message.name} if message.name is not None else {})
        for message in body.messages
    ]

    def render() -> list[int]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return cast(list[int], ids)

    try:
        # In a thread: a long conversation must not hold up the other requests.
        ids = await asyncio.to_thread(render)
    except TemplateError as error:
        raise RequestError(
            f"messages: the model's chat template refuses them: {error}", param="messages", code="invalid_messages"
        ) from None
    return _checked(state, ids, "messages")


async def completion_prompts(state: ServerState, body: CompletionRequest) -> list[list[int]]:
    """Each prompt as token ids; raises :class:`RequestError` for an empty one or a token the model does not have."""
    match body.prompt:
        case str() as text:
            return [_checked(state, await _encode(state, text), "prompt")]
        case [str(), *_] as texts:
            return [_checked(state, await _encode(state, str(text)), f"prompt[{i}]") for i, text in enumerate(texts)]
        case [list(), *_] as lists:
            return [_checked(state, cast(list[int], ids), f"prompt[{i}]") for i, ids in enumerate(lists)]
        case ids:
            return [_checked(state, cast(list[int], ids), "prompt")]


async def _encode(state: ServerState, text: str) -> list[int]:
    return cast(list[int], (await asyncio.to_thread(state.tokenizer, text)).input_ids)


def _checked(state: ServerState, ids: list[int], param: str) -> list[int]:
    if not ids:
        raise RequestError(f"{param}: the prompt has no tokens.", param=param, code="empty_prompt")
    foreign = next((i for i, token in enumerate(ids) if token >= state.vocabulary), None)
    if foreign is not None:
        raise RequestError(
            f"{param}[{foreign}]: there is no token {ids[foreign]}; the model's are 0 to {state.vocabulary - 1}.",
            param=f"{param}[{foreign}]",
            code="unknown_token",
        )
    return ids


def token_budget(state: ServerState, prompts: list[list[int]], asked: int | None, *, param: str) -> int:
    """How many tokens may be generated: what was asked, or what the context has left.

    Raises:
        RequestError: The longest prompt and the tokens asked do not fit the context.
    """
    longest = max(len(prompt) for prompt in prompts)
    room = state.engine.max_model_len - longest
    wanted = asked if asked is not None else room
    if wanted > room or room < 1:
        raise RequestError(
            f"The prompt has {longest} tokens and {max(wanted, 1)} more are asked for, and the model's context holds "
            f"{state.engine.max_model_len}. Shorten the prompt or lower {param!r}.",
            param=param,
            code="context_length_exceeded",
        )
    return wanted
