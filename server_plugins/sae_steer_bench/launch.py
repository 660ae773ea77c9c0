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
_AFTER_FAULT = 2.0  # seconds in which a process whose connections are gone is known to have ended
_PR_SET_PDEATHSIG = 1
_LINUX = sys.platform == "linux"
# Found before a fork, after which another thread's lock of the loader would never be let go.
_prctl = ctypes.CDLL(None).prctl if _LINUX else None


class Port:
    """A port of 127.0.0.1, kept for a server until it listens: whoever asks for any port meanwhile is given another.

    It is bound, and not listened on. On Linux a server that binds with ``SO_REUSEADDR``, as those that are launched do,
    may take it even so. Elsewhere it is let go when the server is started.

    Args:
        wanted: Its number; None = any.

    Raises:
        BenchError: Somebody listens there.
    """

    def __init__(self, wanted: int | None) -> None:
        self._socket = socket.socket()
        # As servers do: a port whose last connections are still fading is free.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            self._socket.close()
            raise BenchError(
                f"--launch: port {wanted} of 127.0.0.1 is taken ({error.strerror}). Name another."
            ) from None
        self.number = int(self._socket.getsockname()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Keeps it no longer."""
        self._socket.close()


class Launched:
    """A server process on 127.0.0.1, with its log in a file.

    It ends with the thread that started it.

    Args:
        argv: Its command line.
        environment: All of its environment.
        port: Where it listens, kept for it until it does.
        log: The file.
        timeout: Seconds that it may take to answer.

    Raises:
        BenchError: It ended, or did not answer in time; with the end of its log.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], *, port: Port, log: Path, timeout: float
    ) -> None:
        self.url = f"http://127.0.0.1:{port.number}"
        self._log = log
        if not _LINUX:
            port.release()
        with port, log.open("wb") as file:
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

    def lost(self) -> str | None:
        """The same as :meth:`ended` for one that stopped answering: connections are gone a moment before a process."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_AFTER_FAULT)
        return self.ended()

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


def _end_with_parent() -> None:
    """On Linux, a server ends with the process that started it, however that ends: nothing is left that takes cores."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
