"""The openai client as a load: what lies between two measurements must not end a run."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from sae_steer_bench import load_openai
from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.load import Address, Work
from sae_steer_bench.load_openai import OpenAILoad
from sae_steer_bench.records import LoadPlan
from tests.server.conftest import Served

PATIENCE_S = 2.5
WORK = Work(bodies=(None,), requests=2, prompt_tokens=4, output_tokens=2, vocabulary=64, seed="")
LOAD = LoadPlan(name="closed", concurrency=2)


class Impatient:
    """Stands before a server, and cuts a connection on which a request comes after a while without any.

    So it is with a server that closes idle connections, where a request and the closing cross.
    """

    def __init__(self, url: str) -> None:
        self._server = urlsplit(url).hostname, urlsplit(url).port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            back = threading.Thread(target=_forward, args=(server, client, None))
            back.start()
            _forward(client, server, PATIENCE_S)
            back.join()


def _forward(source: socket.socket, target: socket.socket, patience: float | None) -> None:
    """Until one of them ends, or a pause was longer than that; then both are ended."""
    last = time.monotonic()
    with suppress(OSError):
        while data := source.recv(65536):
            if patience is not None and time.monotonic() - last > patience:
                break
            last = time.monotonic()
            target.sendall(data)
    for side in (source, target):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def address(served: Served) -> Iterator[Address]:
    impatient = Impatient(served.url)
    yield Address(impatient.url, served.openai().models.list().data[0].id)
    impatient.close()


def test_connections_that_were_idle_are_not_used_again(address: Address) -> None:
    with OpenAILoad(None, 60) as load:
        for pause in (0.0, PATIENCE_S + 0.5):
            time.sleep(pause)
            assert len(load.run(address, WORK, LOAD).samples) == 2


def test_kept_for_longer_they_meet_their_end(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_openai, "_IDLE_S", 60.0)
    with OpenAILoad(None, 60) as load:
        load.run(address, WORK, LOAD)
        time.sleep(PATIENCE_S + 0.5)
        with pytest.raises(LoadFailed, match="stopped answering under load"):
            load.run(address, WORK, LOAD)
