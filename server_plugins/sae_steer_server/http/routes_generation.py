"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

import secrets
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from sae_steer_http.bodies import parse_body, read_json
from sae_steer_http.openapi import request_body
from sae_steer_http.readings import check_reading_size
from sae_steer_http.replies import Reply, edits_digest
from sae_steer_http.steering import compile_aside
from sae_steer_server.engine.sampling import Sampling
from sae_steer_server.http.disconnect import while_connected
from sae_steer_server.http.form_chat import ChatForm
from sae_steer_server.http.form_completion import CompletionForm
from sae_steer_server.http.forms import Form
from sae_steer_server.http.generation import Job, Outcome, generate
from sae_steer_server.http.openai_models import ChatRequest, CompletionRequest, GenerationRequest
from sae_steer_server.http.openapi import GENERATION_ERRORS, stream_or_json
from sae_steer_server.http.prompts import chat_prompt, completion_prompts, token_budget
from sae_steer_server.http.replies import ChatChunk, ChatCompletion, Completion, CompletionChunk
from sae_steer_server.http.streaming import EventStream, events
from sae_steer_server.logs import Record, record_of
from sae_steer_server.state import ServerState, state_of

router = APIRouter(prefix="/v1", tags=["generation"])
_COMPLETION_TOKENS = 16  # OpenAI's default of this route; a chat goes on to the end of the context


@router.post(
    "/chat/completions",
    responses={200: stream_or_json(ChatCompletion, ChatChunk), **GENERATION_ERRORS},
    openapi_extra=request_body(ChatRequest),
)
async def chat_completions(request: Request) -> Response:
    """Answers a conversation, steered or not, whole or as a stream."""
    state = state_of(request)
    body = parse_body(ChatRequest, await read_json(request, state.settings.max_body_bytes))
    program = await compile_aside(state.steering, body.steering, body.model)
    prompts = [await chat_prompt(state, body)]
    asked, param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = body.max_tokens, "max_tokens"
    max_tokens = token_budget(state, prompts, asked, param=param)
    check_reading_size(program, state.steering.limits, map(len, prompts), asked, choices=body.n or 1)
    job = Job(
        model=body.model,
        program=program,
        prompts=prompts,
        n=body.n or 1,
        sampling=_sampling(
            body,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        include_usage=_include_usage(body),
    )
    return await _answer(request, state, job, ChatForm(logprobs=bool(body.logprobs)), stream=bool(body.stream))


@router.post(
    "/completions",
    responses={200: stream_or_json(Completion, CompletionChunk), **GENERATION_ERRORS},
    openapi_extra=request_body(CompletionRequest),
)
async def completions(request: Request) -> Response:
    """Continues one or several prompts, steered or not, whole or as a stream."""
    state = state_of(request)
    body = parse_body(CompletionRequest, await read_json(request, state.settings.max_body_bytes))
    program = await compile_aside(state.steering, body.steering, body.model)
    prompts = await completion_prompts(state, body)
    asked = body.max_tokens if body.max_tokens is not None else _COMPLETION_TOKENS
    max_tokens = token_budget(state, prompts, asked, param="max_tokens")
    check_reading_size(program, state.steering.limits, map(len, prompts), asked, choices=body.n or 1)
    job = Job(
        model=body.model,
        program=program,
        prompts=prompts,
        n=body.n or 1,
        sampling=_sampling(body, max_tokens=max_tokens, logprobs=body.logprobs),
        include_usage=_include_usage(body),
    )
    form = CompletionForm(logprobs=body.logprobs is not None)
    return await _answer(request, state, job, form, stream=bool(body.stream))


def _sampling(body: GenerationRequest, *, max_tokens: int, logprobs: int | None) -> Sampling:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop=stop,
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
    )


def _include_usage(body: GenerationRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


async def _answer(request: Request, state: ServerState, job: Job, form: Form, *, stream: bool) -> Response:
    """The answer, whole or as a stream; the work ends when the client hangs up."""
    record = record_of(request.scope)
    record.program = edits_digest(job.program)
    if stream:
        rest = events(state, job, form, record)
        first = await while_connected(request.receive, anext(rest))
        return EventStream(first, rest, record, job.headers())
    reply = await while_connected(request.receive, _whole(state, job, form, record))
    return Response(reply.encode(), headers=job.headers(), media_type="application/json")


async def _whole(state: ServerState, job: Job, form: Form, record: Record) -> Reply:
    outcomes = [Outcome() for _ in range(job.choices)]
    async with aclosing(generate(state, job, record)) as chunks:
        async for index, chunk in chunks:
            outcomes[index].add(chunk)
    return form.reply(job, outcomes)
