"""Who may call: Host, Origin and keys, checked before routing, so that a 404 is as guarded as an answer."""

import secrets
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sae_steer.errors import Forbidden, SteerError, Unauthorized
from sae_steer_http.errors import steer_error_response

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_PORTS = {"http": "80", "https": "443"}


def same_key(given: str, expected: str) -> bool:
    """Compares keys in a time that does not depend on where they differ."""
    return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def allowed_hosts(bound: str, extra: Iterable[str]) -> frozenset[str]:
    """Host names that are answered, in lower case; an IPv6 address is in brackets, as in the header."""
    names = (name.lower() for name in (bound, *_LOCAL, *extra))
    return frozenset(f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name for name in names)


class Security:
    """ASGI middleware that refuses foreign hosts and origins, and /v1 without its key.

    Args:
        app: What is guarded.
        hosts: From :func:`allowed_hosts`; ``*`` in it allows every host.
        api_key: Bearer key of /v1; None = open.
        refused: Is told of every refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        api_key: str | None,
        refused: Callable[[Scope, SteerError], None],
    ) -> None:
        self.app = app
        self._hosts = hosts
        self._api_key = api_key
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers 401 or 403."""
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except SteerError as error:
                self._refused(scope, error)
                await steer_error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        self._check_host(headers)
        if self._api_key is not None and (path == "/v1" or path.startswith("/v1/")):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not same_key(token.strip(), self._api_key):
                raise Unauthorized("The API key is missing or wrong. Send it as the header Authorization: Bearer KEY.")

    def _check_host(self, headers: Headers) -> None:
        """A page of another site must not reach this server through a visitor's browser (DNS rebinding, CSRF)."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise Forbidden("Send exactly one Host header.")
        host = hosts[0].lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        if "*" not in self._hosts and name not in self._hosts and host not in self._hosts:
            raise Forbidden("This Host is not one that the server answers. Name it at start with --allowed-host.")
        origins = headers.getlist("origin")
        if any(not _same_place(origin, host) for origin in origins):
            raise Forbidden("This Origin is another site; the server answers pages of its own host only.")


def _same_place(origin: str, host: str) -> bool:
    """Whether an Origin names the Host, the scheme's own port left out."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return False
    port = ":" + _PORTS.get(parts.scheme, "")
    return parts.scheme in _PORTS and parts.netloc.removesuffix(port) == host.removesuffix(port)
