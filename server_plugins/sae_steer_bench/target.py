"""What there is to know of a server before it is measured, and whether it does what a case asks."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from sae_steer_bench.cases import Case
from sae_steer_bench.errors import BenchError
from sae_steer_bench.records import SaeFacts, ServerFacts
from sae_steer_http.client import BadAnswer, Refused, Server

_NO_PLUGIN = (
    "{url} answers, and has no /v1/steering ({said}): there is no sae-steer to measure. For vLLM, start it with "
    "VLLM_PLUGINS=sae_steer, or let --launch start it. A server without the plugin is what --plain-url is for."
)
_VOCABULARIES = (32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128)
PROBE_TOKENS = 4


def model_of(server: Server, wanted: str | None) -> str:
    """The model to ask: the wanted one, or the first that is listed; raises :class:`BenchError`."""
    try:
        names = [str(entry["id"]) for entry in server.get("/v1/models")["data"]]
    except Refused as error:
        key = " Give its key with --api-key or SAE_STEER_API_KEY." if error.status in (401, 403) else ""
        raise BenchError(f"{server.url}/v1/models: {error}{key}") from None
    except (BadAnswer, KeyError, TypeError) as error:
        raise BenchError(f"{server.url}/v1/models is not OpenAI's: {error}. Is this such a server?") from None
    if not names:
        raise BenchError(f"{server.url} serves no model.")
    if wanted is not None and wanted not in names:
        raise BenchError(f"There is no model {wanted!r} at {server.url}. Models: {', '.join(names)}.")
    return wanted or names[0]


def facts_of(server: Server, wanted: str | None) -> ServerFacts:
    """Asks a server with the plugin; raises :class:`BenchError` where it is none."""
    model = model_of(server, wanted)
    try:
        table = server.get("/v1/steering/capabilities")
        saes = server.get("/v1/steering/saes")["data"]
        rows: list[Mapping[str, Any]] = table["data"]
        return ServerFacts(
            host=str(table["host"]),
            version=_version(server),
            model=model,
            saes=[
                SaeFacts(
                    id=sae["id"],
                    site=sae["site"],
                    features=sae["features"],
                    fingerprint=sae["fingerprint"],
                    whole=sae["whole"],
                )
                for sae in saes
            ],
            limits={name: float(value) for name, value in table["limits"].items() if isinstance(value, int | float)},
            features=[str(row["key"]) for row in rows if row["supported"]],
            vocabulary=vocabulary(server, model),
            local=urlsplit(server.url).hostname in ("127.0.0.1", "localhost", "::1"),
        )
    except Refused as error:
        raise BenchError(_NO_PLUGIN.format(url=server.url, said=error)) from None
    except (BadAnswer, KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{server.url}/v1/steering answers otherwise than sae-steer does: {error!r}.") from None


def require_plain(server: Server) -> None:
    """Raises :class:`BenchError` where a server that is named as one without the plugin has an SAE."""
    try:
        saes = server.get("/v1/steering/saes")["data"]
    except (Refused, BadAnswer, KeyError):
        return
    if saes:
        raise BenchError(
            f"{server.url} has SAEs, so it is no server without the plugin. --plain-url names one that was started "
            "without VLLM_PLUGINS=sae_steer, or without --sae."
        )


def vocabulary(server: Server, model: str) -> int:
    """A power of two below which every token id is one of the model's; raises :class:`BenchError`."""
    said = ""
    for size in _VOCABULARIES:
        body = {"model": model, "prompt": [size - 1], "max_tokens": 1, "temperature": 0}
        status, said = server.status("/v1/completions", body)
        if status == 200:
            return size
    raise BenchError(f"{server.url} takes no prompt of token ids: {said}")


def refusal(server: Server, model: str, case: Case, prompt: list[int]) -> str | None:
    """Why the server does not do what a case asks, in its own words; None = it does.

    Its first and its last program are tried. A case whose edits did nothing would be measured as one that did.
    """
    programs = case.programs
    for body in dict.fromkeys([0, len(programs) - 1]) if programs else ():
        steering = programs[body]
        ask = {"model": model, "prompt": prompt, "max_tokens": PROBE_TOKENS, "temperature": 0, "steering": steering}
        try:
            choice = server.post("/v1/completions", ask)["choices"][0]
        except Refused as error:
            return str(error)
        block = choice.get("steering")
        if block is None:
            return "it answered without saying that it steered"
        if steering.get("interventions") and not block["applied"]["fired"]:
            return "it answered that no edit changed anything; --value sets what features are clamped to"
        if "readings" in steering and not block.get("readings"):
            return "it answered without readings"
    return None


def _version(server: Server) -> str | None:
    try:
        return str(server.get("/version")["version"])
    except (Refused, BadAnswer, KeyError):
        return None
