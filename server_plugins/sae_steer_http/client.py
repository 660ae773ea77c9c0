"""Asks a server over HTTP, and says in words what went wrong."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from sae_steer.errors import StartError

_T = TypeVar("_T")
_SHOWN = 300  # characters of a server's own message


class BadAnswer(Exception):
    """An answer that is not of OpenAI's form."""


class Unreachable(StartError):
    """The server does not answer."""


class Refused(Exception):
    """The server answered with an error.

    Args:
        status: HTTP status.
        message: What the server says.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


class Server:
    """A server under its address.

    Args:
        url: With or without ``/v1``.
        api_key: Bearer key; None = none is sent.
        timeout: Seconds that one answer may take.

    Raises:
        StartError: The address cannot be one.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        if not self.url.startswith(("http://", "https://")):
            raise StartError(f"--url {url!r} is not an address. Write it like http://127.0.0.1:8000.")
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, follow_redirects=False)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise StartError(f"--url {url!r} or --api-key cannot be sent: {error}.") from None
        self._timeout = timeout

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def get(self, path: str, **query: str | int) -> Any:
        """The JSON that a route answers; raises :class:`Refused`, :class:`Unreachable` or :class:`BadAnswer`."""
        return _json(self._send("GET", path, params=query))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a route answers to a body; raises the same."""
        return _json(self._send("POST", path, json=body))

    def status(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Status of the answer to a body, and what it says where it is an error; raises :class:`Unreachable`."""
        reply = self._send("POST", path, json=body)
        return reply.status_code, "" if reply.is_success else message_of(reply)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream; raises the same, and :class:`BadAnswer` where it breaks off."""
        try:
            with self._http.stream("POST", path, json={**body, "stream": True}) as reply:
                if not reply.is_success:
                    reply.read()
                    raise Refused(reply.status_code, message_of(reply))
                for line in reply.iter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return
                    event = _parse(line[6:])
                    if "error" in event:
                        raise BadAnswer(f"the stream ended with an error: {_short(str(event['error']))}")
                    yield event
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        raise BadAnswer("the stream broke off before its [DONE]")

    def together(self, tasks: list[Callable[[], _T]]) -> list[_T]:
        """Runs tasks at once, each in a thread; raises what the first failing one raised."""
        with ThreadPoolExecutor(len(tasks)) as pool:
            return [future.result() for future in [pool.submit(task) for task in tasks]]

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                reply = self._http.request(method, path, **options)
            except httpx.HTTPError as error:
                raise self._lost(error) from error
            wait = reply.headers.get("retry-after", "1")
            seconds = float(wait) if wait.isdigit() else 1.0
            # A busy server is asked again: other clients may be using it.
            if reply.status_code != 429 or time.monotonic() + seconds > deadline:
                return reply
            time.sleep(seconds)

    def _lost(self, error: httpx.HTTPError) -> Unreachable:
        if isinstance(error, httpx.TimeoutException):
            return Unreachable(
                f"{self.url} did not answer within {self._timeout:g} s. Is it busy, or still loading? --timeout gives "
                "it more."
            )
        reason = str(error) or type(error).__name__
        return Unreachable(f"{self.url} cannot be reached: {reason}. Is the server running, and the port right?")


def _json(reply: httpx.Response) -> Any:
    if not reply.is_success:
        raise Refused(reply.status_code, message_of(reply))
    return _parse(reply.text)


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        raise BadAnswer(f"the answer is not JSON: {_short(text)}") from None
    if not isinstance(value, dict):
        raise BadAnswer(f"the answer is not a JSON object: {_short(text)}")
    return value


def message_of(reply: httpx.Response) -> str:
    """What an error says, in OpenAI's form or any other."""
    try:
        value = json.loads(reply.text)
        return _short(str(value["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return _short(reply.text or reply.reason_phrase)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
