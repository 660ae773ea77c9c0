"""What a host can do, and the one place that refuses: each row says what is asked, why not, and what to do instead."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from sae_steer.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something a host cannot honour exactly.

    Args:
        key: Stable name, such as ``op.app``.
        what: What is asked, in words.
        why: Why it cannot be honoured.
        instead: What to do instead.
    """

    key: str
    what: str
    why: str
    instead: str


_FEATURES = {
    "op.clamp": "clamp a feature",
    "op.add": "add to a feature, or along a vector",
    "op.scale": "scale a feature",
    "op.ablate": "ablate a feature, or a direction",
    "op.floor": "floor a feature",
    "op.cap": "cap a feature",
    "op.mask_range": "mask a range of a feature",
    "op.gain": "multiply a feature by a constant gain",
    "op.app": "attenuate a feature by posterior probabilities",
    "when": "gate an edit by a feature or a token id",
    "positions": "choose positions",
    "error.drop": "drop the reconstruction error",
    "dose": "limit the dose",
    "profiles": "use stored profiles",
    "readings": "send activations back",
    "on": "act on the request when a feature fires",
    "on.stop": "end the answer when a feature fires",
    "prefix_cache": "share the KV cache of common prefixes",
    "beam_search": "beam search",
}


class Capabilities:
    """The features of one host and mode.

    Args:
        host: Name of the host, for the table.
        refusals: What it cannot honour.
    """

    def __init__(self, host: str, refusals: Iterable[Refusal]) -> None:
        self.host = host
        self._refusals = {refusal.key: refusal for refusal in refusals}
        unknown = set(self._refusals) - set(_FEATURES)
        if unknown:
            raise ValueError(f"unknown capability keys: {sorted(unknown)}")

    def require(self, key: str, *, param: str) -> None:
        """Raises :class:`Unsupported` where the host cannot honour ``key``; ``param`` is the field that asks for it."""
        if key not in _FEATURES:
            raise ValueError(f"unknown capability key: {key}")
        if key in self._refusals:
            refuse(self._refusals[key], param=param)

    def table(self) -> list[dict[str, Any]]:
        """One row for each feature: ``{what, supported, why, instead}``."""
        rows: list[dict[str, Any]] = []
        for key, what in _FEATURES.items():
            refusal = self._refusals.get(key)
            rows.append(
                {
                    "key": key,
                    "what": what,
                    "supported": refusal is None,
                    "why": refusal.why if refusal else None,
                    "instead": refusal.instead if refusal else None,
                }
            )
        return rows


def refuse(refusal: Refusal, *, param: str) -> NoReturn:
    """Raises :class:`Unsupported` with what, why and instead."""
    raise Unsupported(
        f"{param}: {refusal.what} cannot be honoured: {refusal.why}. Instead: {refusal.instead}.", param=param
    )


TRANSFORMERS = Capabilities(
    "transformers",
    (
        Refusal(
            "prefix_cache",
            "prefix caching",
            "transformers shares completed blocks by their tokens alone, which would leak steered keys and values",
            "nothing is needed: it is off, and answers are right",
        ),
        Refusal(
            "beam_search",
            "beam search",
            "continuous batching decodes one sequence a request",
            "ask for several choices with 'n'",
        ),
    ),
)
"""The embedded server, over transformers' continuous batching."""

VLLM = Capabilities(
    "vllm",
    (
        Refusal(
            "beam_search",
            "beam search",
            "vLLM makes each step of it a request of its own, with another prompt",
            "ask for several choices with 'n'",
        ),
    ),
)
"""vLLM, with the plugin."""

IN_PROCESS = Capabilities(
    "in-process",
    (
        Refusal(
            "on.stop",
            "the action 'stop'",
            "the loop that generates is not ours here",
            "use the action 'flag', and end generation by a StoppingCriteria that looks at Rows.reports()",
        ),
    ),
)
"""``sae_steer.attach`` on a transformers model in the same process."""
