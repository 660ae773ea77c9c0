"""Every form in which a steered answer comes says what was done, and what cannot be steered is refused."""

from typing import Any

from sae_steer_cli.checks.answers import Answer, applied_of, get, program_of
from sae_steer_cli.checks.subject import Failed, Skipped, Subject
from sae_steer_http.client import Refused


def several_choices(subject: Subject) -> str:
    """Each of several choices has its own block."""
    # Sampled: vLLM does not draw several greedy choices.
    body = subject.body(subject.prompt(), n=2, temperature=1.0, seed=1, steering=subject.chosen.steering())
    reply = subject.server.post("/v1/completions", body)
    choices = get(reply, "choices")
    fired = [_fired(choice, f"choice {i} of 2") for i, choice in enumerate(choices)]
    if len(fired) != 2:
        raise Failed(f"{len(fired)} choices came where 2 were asked for")
    return f"2 choices, whose edits fired {fired[0]} and {fired[1]} times"


def stream(subject: Subject) -> str:
    """A steered stream has the text of the whole answer, and its last event the block; a plain one has none."""
    prompt = subject.prompt()
    whole = subject.steered(prompt, cold=True)
    body = subject.body(prompt, steering=subject.chosen.steering())
    text, last, programs = _read(subject, body)
    if text != whole.text and not (subject.logprobs and _near(subject, prompt, text)):
        raise Failed("a steered stream has another text than the same request answered whole")
    fired = _fired(last, "the last event of a steered stream")
    if programs != {whole.program}:
        raise Failed(f"the events of the stream name the programs {programs}, and the whole answer {whole.program}")
    _, last, programs = _read(subject, subject.body(prompt))
    if programs or last.get("steering") is not None:
        raise Failed("a plain stream says that it was steered")
    return f"the last event says that the edit fired {fired} times"


def _near(subject: Subject, prompt: str, text: str) -> bool:
    """Whether the text is one of those that the request gives here: a tie may fall either way."""
    again = [subject.steered(prompt), subject.steered(prompt, cold=True)]
    return any(answer.text == text for answer in again)


def _read(subject: Subject, body: dict[str, Any]) -> tuple[str, dict[str, Any], set[str]]:
    """A stream's text, its choice's last event, and the programs that its events name."""
    text, last, programs = "", dict[str, Any](), set[str]()
    for event in subject.server.stream("/v1/completions", body):
        program = program_of(event)
        programs |= {program} if program is not None else set()
        for choice in get(event, "choices"):
            text += choice.get("text") or ""
            if choice.get("finish_reason") is not None:
                last = choice
    if not last:
        raise Failed("a stream ended without a finish_reason")
    return text, last, programs


def chat(subject: Subject) -> str:
    """A chat can be steered, and a plain one is not."""
    messages = [{"role": "user", "content": subject.prompt()}]
    body: dict[str, Any] = {"model": subject.model, "messages": messages, "max_tokens": 16, "temperature": 0}
    try:
        before = subject.server.post("/v1/chat/completions", body)
    except Refused as error:
        if error.status in (400, 404):
            raise Skipped(f"the server does not chat: {error}") from None
        raise
    steered = subject.server.post("/v1/chat/completions", body | {"steering": subject.chosen.steering()})
    after = subject.server.post("/v1/chat/completions", body)
    choice = get(steered, "choices", 0)
    fired = _fired(choice, "a steered chat")
    if program_of(steered) is None:
        raise Failed("a steered chat was answered without steering.program")
    for reply in (before, after):
        if get(reply, "choices", 0).get("steering") is not None or program_of(reply) is not None:
            raise Failed("a plain chat was answered as a steered one")
    texts = [get(reply, "choices", 0, "message", "content") for reply in (before, steered, after)]
    changed = "changes" if texts[1] != texts[0] else "does not change"
    if texts[0] != texts[2] and texts[2] == texts[1]:
        raise Failed("a plain chat after a steered one has the steered answer")
    return f"the edit fired {fired} times and {changed} the answer"


def profile_as_model(subject: Subject) -> str:
    """A stored profile is a model too, and the same program as in the field ``steering``."""
    profiles = get(subject.server.get("/v1/steering/profiles"), "data")
    names = [str(entry["name"]) for entry in profiles if not entry.get("error")]
    if not names:
        raise Skipped("the server has no profile")
    model = f"{subject.model}:{names[0]}"
    listed = [entry["id"] for entry in get(subject.server.get("/v1/models"), "data")]
    if model not in listed:
        raise Failed(f"/v1/models does not list {model!r}, though there is a profile {names[0]!r}")
    prompt = subject.prompt()
    by_field = subject.ask(prompt, {"profiles": [names[0]]}, cold=True)
    reply = subject.server.post("/v1/completions", subject.body(prompt, model=model))
    by_name = Answer.of(reply)
    if by_name.applied is None or by_name.program != by_field.program:
        raise Failed(
            f"model {model!r} runs the program {by_name.program}, and the profile in `steering` {by_field.program}"
        )
    difference = subject.require_same(by_name, by_field, f"model {model!r} answers otherwise than its profile")
    return f"{model}: {difference}"


def beam_search(subject: Subject) -> str:
    """Beam search cannot be steered exactly, so it is refused."""
    body = {
        "model": subject.model,
        "prompt": "a",
        "max_tokens": 2,
        "n": 2,
        "use_beam_search": True,
        "steering": subject.chosen.steering(),
    }
    status, message = subject.server.status("/v1/completions", body)
    if status != 400:
        raise Failed(f"beam search with `steering` is answered with HTTP {status} instead of 400")
    return f"refused: {message}"


def other_routes(subject: Subject) -> str:
    """Routes that cannot be steered do not answer as if they could."""
    steering = subject.chosen.steering()
    message = {"role": "user", "content": "a"}
    routes: dict[str, dict[str, Any]] = {
        "/v1/responses": {"input": "a", "max_output_tokens": 2},
        "/v1/messages": {"messages": [message], "max_tokens": 2},
        "/v1/embeddings": {"input": "a"},
    }
    for path, form in routes.items():
        status, _ = subject.server.status(path, {"model": subject.model, **form, "steering": steering})
        if status < 400:
            raise Failed(f"{path} answers a request with `steering` (HTTP {status}), and cannot have steered it")
    return f"{', '.join(routes)} refuse `steering`, or are not there"


def _fired(choice: dict[str, Any], what: str) -> int:
    """How often edits changed something in a choice; raises :class:`Failed` where it does not say, or never."""
    applied = applied_of(choice)
    if applied is None:
        raise Failed(f"{what} has no block `steering`")
    fired = int(applied["fired"])
    if fired == 0:
        raise Failed(f"{what} says that the edit changed nothing")
    return fired
