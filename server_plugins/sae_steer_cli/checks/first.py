"""The checks that come first: is this a server with sae-steer at all, and do its plain answers repeat?"""

from functools import partial
from secrets import token_hex
from typing import Any

from sae_steer.errors import StartError
from sae_steer_cli.checks.answers import LEAST_BOUND, compare, get
from sae_steer_cli.checks.subject import Failed, Subject
from sae_steer_http.client import BadAnswer, Refused, Server

UNKNOWN_KEY = {"no_such_key": 1}


def model_of(server: Server, wanted: str | None) -> str:
    """The model to ask: the one that is wanted, or the first that the server lists.

    Raises:
        StartError: The server cannot be asked, or has no such model.
    """
    try:
        names = [str(get(model, "id")) for model in get(server.get("/v1/models"), "data")]
    except Refused as error:
        if error.status in (401, 403):
            raise StartError(
                f"{server.url} refuses to talk: {error.message} Give its key with --api-key or SAE_STEER_API_KEY."
            ) from None
        raise StartError(f"{server.url}/v1/models: {error}. Is this an OpenAI-compatible server?") from None
    except BadAnswer as error:
        raise StartError(f"{server.url}/v1/models: {error}. Is this an OpenAI-compatible server?") from None
    if not names:
        raise StartError(f"{server.url} serves no model.")
    if wanted is not None and wanted not in names:
        raise StartError(f"There is no model {wanted!r} at {server.url}. Models: {', '.join(names)}.")
    model = wanted or names[0]
    base = next((name for name in names if model.startswith(f"{name}:")), None)
    if base is not None and wanted is not None:
        raise StartError(f"--model {model!r} is a profile's name. The checks need the model itself: --model {base!r}.")
    return model


def serves_steering(subject: Subject) -> str:
    """The server has the routes of sae-steer."""
    try:
        table = subject.server.get("/v1/steering/capabilities")
        subject.saes = get(subject.server.get("/v1/steering/saes"), "data")
    except Refused as error:
        raise Failed(_why_not(subject, error)) from None
    subject.host = str(get(table, "host"))
    cached = {row["key"]: row["supported"] for row in get(table, "data")}.get("prefix_cache", False)
    subject.salts = subject.host == "vllm" and cached
    subject.context = get(table, "limits").get("max_model_len")
    places = ", ".join(f"{sae['id']} at {sae['site']}" for sae in subject.saes) or "none"
    cache = "" if cached else " without a prefix cache"
    return f"host {subject.host}{cache}, model {subject.model}, SAEs: {places}"


def _why_not(subject: Subject, error: Refused) -> str:
    """What is wrong with a server that has no ``/v1/steering``."""
    if error.status != 404:
        return f"/v1/steering/capabilities: {error}"
    body = {"model": subject.model, "prompt": "a", "max_tokens": 1, "steering": UNKNOWN_KEY}
    status, message = subject.server.status("/v1/completions", body)
    if status == 200:
        return (
            "this server runs without sae-steer, and ignores `steering` without a word. For vLLM: install sae-steer in "
            "its environment, and start it with VLLM_PLUGINS=sae_steer and what `sae-steer vllm-args` prints"
        )
    return (
        f"this server has no /v1/steering, and refuses `steering` (HTTP {status}: {message}). For vLLM: its endpoint "
        "plugin is not loaded, so start it with VLLM_PLUGINS=sae_steer"
    )


def refuses_nonsense(subject: Subject) -> str:
    """Malformed steering is answered with 400, on both routes: a server that ignores the field would answer it."""
    sae = subject.saes[0] if subject.saes else {"id": "none", "features": 1}
    edit = {"sae": sae["id"], "features": [0], "op": "ablate"}
    wrong: dict[str, dict[str, Any]] = {
        "an unknown key": UNKNOWN_KEY,
        "an unknown op": {"interventions": [edit | {"op": "no_such_op"}]},
        "an unknown SAE": {"interventions": [edit | {"sae": f"no-{token_hex(4)}"}]},
        "a feature that the SAE does not have": {"interventions": [edit | {"features": [sae["features"]]}]},
        "a number in a string": {"interventions": [edit | {"op": "clamp", "value": "1"}]},
        "an unknown profile": {"profiles": [f"no-{token_hex(4)}"]},
    }
    routes: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }
    for path, form in routes.items():
        for what, steering in wrong.items():
            body = {"model": subject.model, "max_tokens": 1, **form, "steering": steering}
            status, message = subject.server.status(path, body)
            if status == 200:
                raise Failed(f"{path} answers a request with {what} in `steering` as if all were well: it ignores it")
            if status != 400:
                raise Failed(f"{path} answers {what} in `steering` with HTTP {status} instead of 400: {message}")
    return f"{len(routes) * len(wrong)} malformed requests, each answered with 400"


def repeats(subject: Subject) -> str:
    """Plain answers repeat, cold and cached, alone and beside each other; how exactly is what the rest is held to."""
    try:
        subject.measure()
    except Refused as error:
        if error.status != 400:
            raise
        subject.logprobs = False  # a server may refuse them: vLLM with --max-logprobs 0
        subject.measure()
    prompt = subject.prompt()
    first = subject.ask(prompt, cold=True)
    subject.logprobs = first.tokens is not None
    alone = [subject.ask(prompt, cold=True), subject.ask(prompt), subject.ask(prompt)]
    subject.reports_cached = bool(alone[-1].cached)
    beside = [subject.prompt() for _ in range(3)]
    batch = subject.server.together([partial(subject.ask, text) for text in (prompt, *beside, prompt)])
    differences = [compare(first, other) for other in (*alone, batch[0], batch[-1])]
    worst = max(differences, key=lambda difference: difference.noise)
    if worst.noise > 1 and worst.at is not None:
        raise Failed(
            f"plain answers to one prompt differ before anything was steered ({worst}), so nothing can be compared here"
        )
    # Half a dozen answers do not show the largest rounding there is.
    subject.bound = max(LEAST_BOUND, 4 * worst.noise)
    cached = f"; a repeated prompt takes {alone[-1].cached} of {first.prompt_tokens} tokens from the prefix cache"
    return f"{len(differences)} answers: {worst}{cached if subject.reports_cached else ''}"
