"""Runs the application until a signal, then finishes or fails what runs before it goes."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from sae_steer_server.http.app import create_app
from sae_steer_server.logs import get_logger
from sae_steer_server.sockets import is_local, url_of
from sae_steer_server.state import ServerState

_MARGIN = 5  # seconds, for answers to leave once the engine has ended them
_log = get_logger("sae_steer_server.serve")


class Server(uvicorn.Server):
    """uvicorn, with the engine stopped first: what still runs after the grace gets an answer, not a cut connection.

    Args:
        config: uvicorn's.
        state: The server's parts.
        ready: Called once requests are answered.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state = state
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, ends the engine within the grace, and waits for the answers to leave."""
        for server in self.servers:
            server.close()
        await self._state.stop()
        await super().shutdown(sockets)


def make_server(state: ServerState, ready: Callable[[], None]) -> Server:
    """A server of a loaded state, to be run on a bound socket."""
    config = uvicorn.Config(
        create_app(state),
        log_config=None,  # ours, set up already
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could name any host in them
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_MARGIN,
    )
    return Server(config, state, ready)


def serve(state: ServerState, sock: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; returns when all is finished."""
    url = url_of(sock)
    settings = state.settings

    def ready() -> None:
        _log.info("serving", url=url, models=list(settings.model_names))
        # The one line on stdout: for a person, and for a script that asked for any free port.
        print(f"Serving {settings.model_names[0]} on {url}", flush=True)  # noqa: T201

    if not is_local(sock.getsockname()[0]) and settings.api_key is None:
        _log.warning("anyone who reaches this address may use the server; set --api-key", url=url)
    # uvicorn raises the signal again once it has shut down; by then there is nothing left to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handled)
    make_server(state, ready).run(sockets=[sock])


def _handled(_: int, __: FrameType | None) -> None:
    """A signal that was acted on already."""
