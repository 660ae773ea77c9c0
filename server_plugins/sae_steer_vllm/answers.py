"""vLLM's answers with the plugin's blocks in them: whole ones, and streams event by event."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from sae_steer.errors import RunFailed, SteerError
from sae_steer_http.errors import steer_error_json
from sae_steer_http.replies import edits_digest
from sae_steer_vllm.frontend import Collector

_T = TypeVar("_T")
_DONE = b"[DONE]"


class BlockLost(RunFailed):
    """A choice ended and nobody said what was done to it."""

    code = "report_lost"


class Answer:
    """Puts steering's blocks into the answer to one request.

    Args:
        collector: What became of it in the engine.
        model: The model's name as the client wrote it; None = it wrote none.
        per_prompt: Choices of each prompt.
    """

    def __init__(self, collector: Collector, model: str | None, per_prompt: int) -> None:
        self._collector = collector
        self._model = model
        self._per_prompt = per_prompt

    @property
    def failure(self) -> SteerError | None:
        """The error that the answer must be."""
        return self._collector.failure

    def fill(self, answer: dict[str, Any]) -> None:
        """Completes an answer, or an event of a stream; raises :class:`BlockLost`."""
        answer["steering"] = {"program": edits_digest(self._collector.program)}
        if self._model is not None and "model" in answer:
            answer["model"] = self._model
        blocks = self._by_choice(self._collector.done)
        running = self._by_choice(self._collector.running)
        for choice in answer.get("choices", ()):
            if choice.get("finish_reason") is not None:
                block = blocks.get(choice["index"])
                if block is None:
                    raise BlockLost(
                        "The answer is there, and the report of what steered it was lost. It is not sent without: "
                        "this is a fault of the server."
                    )
                choice["steering"] = block
            elif choice["index"] in running:
                new = running[choice["index"]].new_readings()
                if new is not None:
                    choice["steering"] = {"readings": new}

    def _by_choice(self, found: Mapping[tuple[str, int], _T]) -> Mapping[int, _T]:
        """By the number of their choice; the engine's own ids say which prompt they belong to."""
        chosen: dict[int, _T] = {}
        for (request, index), value in found.items():
            prompt = request.rpartition("-")[2] if request.startswith("cmpl-") else "0"
            chosen[int(prompt) * self._per_prompt + index] = value
        return chosen


class Events:
    """The events of a stream, completed one by one. Bytes come in as they will.

    Args:
        answer: Completes an event.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""
        self._failed = False

    def feed(self, data: bytes) -> bytes:
        """What may be sent once ``data`` has come."""
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        return b"".join(self._events(whole))

    def _events(self, events: list[bytes]) -> Iterator[bytes]:
        for event in events:
            if self._failed and event != b"data: " + _DONE:
                continue  # the stream has ended with an error
            yield self._event(event) + b"\n\n"

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: ") or event[6:] == _DONE:
            return event
        value = json.loads(event[6:])
        failure = self._answer.failure
        if failure is None and "error" not in value:
            try:
                self._answer.fill(value)
            except BlockLost as error:
                failure = error
        if failure is not None:
            self._failed = True
            return b"data: " + steer_error_json(failure)
        return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
