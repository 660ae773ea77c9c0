"""Server-sent events: a stream either ends with ``[DONE]`` or with an error event, never as if all had gone well."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sae_steer.errors import SteerError
from sae_steer_http.errors import steer_error_json
from sae_steer_http.replies import Reply
from sae_steer_server.http.disconnect import while_connected
from sae_steer_server.http.forms import Form
from sae_steer_server.http.generation import Job, Outcome, generate
from sae_steer_server.logs import Record
from sae_steer_server.state import ServerState

_DONE = b"data: [DONE]\n\n"


async def events(state: ServerState, job: Job, form: Form, record: Record) -> AsyncGenerator[Reply, None]:
    """The events of a stream, in order; raises what :func:`generate` raises."""
    outcomes = [Outcome() for _ in range(job.choices)]
    opened: set[int] = set()
    async with aclosing(generate(state, job, record)) as chunks:
        async for index, chunk in chunks:
            opening = form.opening(job, index) if index not in opened else None
            opened.add(index)
            if opening is not None:
                yield opening
            event = form.event(job, index, chunk, outcomes[index])
            outcomes[index].add(chunk)
            if chunk.text or chunk.logprobs or chunk.steering or chunk.finish_reason is not None:
                yield event
    if job.include_usage:
        yield form.usage_event(job, outcomes)


class EventStream(StreamingResponse):
    """A response whose events are closed with it, whatever ended it.

    Args:
        first: The first event. It is awaited before the status is sent, so that what fails at once has its own status.
        rest: The events after it.
        record: Learns of an error.
        headers: Beside those that every stream has.
    """

    def __init__(
        self, first: Reply, rest: AsyncGenerator[Reply, None], record: Record, headers: dict[str, str]
    ) -> None:
        self._rest = rest
        self._record = record
        still = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not hold events back
        super().__init__(self._lines(first), headers=headers | still, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client hangs up."""
        async with aclosing(self._rest):
            await while_connected(receive, self.stream_response(send))

    async def _lines(self, first: Reply) -> AsyncGenerator[bytes, None]:
        yield _line(first.encode())
        try:
            async for event in self._rest:
                yield _line(event.encode())
        except SteerError as error:
            self._record.code = error.code
            yield _line(steer_error_json(error))
            return
        yield _DONE


def _line(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
