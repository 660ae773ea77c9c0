"""Servers that a measurement starts, and ends: these, and no other process."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from sae_steer_bench.errors import BenchError

_GRACE = 30.0  # seconds to end in after SIGTERM
_SHOWN = 1500  # characters of a log
_PR_SET_PDEATHSIG = 1


class Launched:
    """A server process on 127.0.0.1, with its log in a file.

    Args:
        argv: Its command line.
        environment: All of its environment.
        port: Where it listens.
        log: The file.
        timeout: Seconds that it may take to answer.

    Raises:
        BenchError: It ended, or did not answer in time; with the end of its log.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], *, port: int, log: Path, timeout: float
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment),
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        try:
            self._wait(timeout)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.stop()

    def ended(self) -> str | None:
        """The end of its log where it has ended by itself; None = it runs."""
        code = self.process.poll()
        return None if code is None else f"The server ended with {code}; its log, {self._log}, ends: {self._tail()}"

    def stop(self) -> None:
        """Ends it: politely, then with whatever it left in its own process group."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while True:
            ended = self.ended()
            if ended is not None:
                raise BenchError(ended)
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            if time.monotonic() > end:
                raise BenchError(f"The server was not ready after {timeout:g} s; {self._log} ends: {self._tail()}")
            time.sleep(0.2)

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-_SHOWN:].strip()


def free_port(wanted: int | None) -> int:
    """A port of 127.0.0.1 that nobody listens on; raises :class:`BenchError` where the wanted one is taken."""
    with socket.socket() as found:
        # As servers do: a port whose last connections are still fading is free.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise BenchError(
                f"--launch: port {wanted} of 127.0.0.1 is taken ({error.strerror}). Name another."
            ) from None
        return int(found.getsockname()[1])


def _end_with_parent() -> None:
    """On Linux, a server ends with the process that started it, however that ends: nothing is left that takes cores."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
