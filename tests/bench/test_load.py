"""The load: when requests are sent, and how many there are of them."""

import socket
import threading
import time
from contextlib import suppress
from itertools import takewhile
from typing import Any, BinaryIO

import numpy as np
import pytest

from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.load import Address, Work
from sae_steer_bench.load_openai import OpenAILoad
from sae_steer_bench.planning import _loads, _requests
from sae_steer_bench.records import LoadPlan
from sae_steer_bench.samples import Batch, Sample
from tests.bench.conftest import options


def work(
    requests: int, arrivals: str = "1", seed: str = "a", bodies: tuple[dict[str, Any] | None, ...] = (None,)
) -> Work:
    return Work(
        bodies=bodies, requests=requests, prompt_tokens=4, output_tokens=4, vocabulary=256, seed=seed,
        arrivals=arrivals,
    )  # fmt: skip


def test_arrivals_are_a_poisson_process() -> None:
    starts = np.asarray(work(20_001).starts(4.0))
    gaps = np.diff(starts)
    assert (len(starts), starts[0]) == (20_001, 0.0)
    # An exponential's mean is its deviation: both are 1 / rate, known here within 3 %.
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)
    assert work(3).starts(None) == [0.0, 0.0, 0.0]


def test_cases_of_a_round_share_arrivals_and_no_prompts() -> None:
    one, other, later = work(8, seed="a"), work(8, seed="b"), work(8, "2")
    assert one.starts(2.0) == other.starts(2.0) != later.starts(2.0)
    assert not {tuple(prompt) for prompt in one.prompts()} & {tuple(prompt) for prompt in other.prompts()}


FIRST = Batch([Sample(0.5, (0.5,), 2)] * 4, 2.0)
"""Four requests in two seconds."""


def test_a_rate_is_measured_once_and_half_has_a_name_of_its_own(tmp_path: object) -> None:
    wanted = options(tmp_path, concurrency=4, rates=(0.0, 3.0, 0.5, 3.0, 0.0))
    assert [(load.name, load.rate) for load in _loads(wanted, FIRST)] == [
        ("closed", None), ("half rate", 1.0), ("rate 3/s", 3.0), ("rate 0.5/s", 0.5),
    ]  # fmt: skip
    slow = Batch(FIRST.samples, 1e6)
    assert _loads(wanted, slow)[1].rate == pytest.approx(2e-6)


def test_slow_rates_take_of_the_time(tmp_path: object) -> None:
    wanted = options(tmp_path, concurrency=4, requests=None, minutes=10.0, rounds=10)
    closed, slow = LoadPlan(name="closed", concurrency=4), LoadPlan(name="slow", concurrency=4, rate=0.5)
    # 600 s over ten rounds of two cases are 30 s for each: at 2 s a batch more than eight, with another 8 s three.
    assert _requests(wanted, FIRST, [closed], 2) == 4 * 8
    assert _requests(wanted, FIRST, [closed, slow], 2) == 4 * 3


CHUNK = b'{"id":"x","object":"text_completion","created":0,"model":"m",%s}'
EVENTS = (
    CHUNK % b'"choices":[{"index":0,"text":"a","finish_reason":"length"}]',
    CHUNK % b'"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":4,"total_tokens":8}',
    b"[DONE]",
)
ANSWER = b"".join(b"data: %s\n\n" % event for event in EVENTS)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"


def _headers(requests: BinaryIO) -> list[bytes]:
    """The lines of the next request's head; none where the connection has ended."""
    return list(takewhile(lambda line: line not in (b"", b"\r\n"), iter(requests.readline, None)))


class Impatient:
    """A server that ends a connection on which a request comes more than two seconds after the one before.

    So do all servers at the end of their patience, which mostly is five seconds, if a request is on its way just then.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(f"http://127.0.0.1:{self._listener.getsockname()[1]}", "m")
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        last = time.monotonic()
        # A client that has seen enough leaves.
        with suppress(ConnectionError), connection, connection.makefile("rb") as requests:
            while headers := _headers(requests):
                if time.monotonic() - last > 2.05:
                    return
                (length,) = [line for line in headers if line.lower().startswith(b"content-length:")]
                requests.read(int(length.partition(b":")[2]))
                connection.sendall(HEAD % len(ANSWER) + ANSWER)
                last = time.monotonic()


def test_a_connection_that_the_server_gives_up_is_not_used_again() -> None:
    server = Impatient()
    with OpenAILoad(None, 30) as sender:
        for pause in (0.0, 2.4):
            time.sleep(pause)
            batch = sender.run(server.address, work(2), LoadPlan(name="closed", concurrency=2))
            assert [sample.tokens for sample in batch.samples] == [4, 4]


def test_a_lost_connection_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_steer_bench.load_openai._KEPT", 60.0)
    server = Impatient()
    with OpenAILoad(None, 30) as sender:
        sender.run(server.address, work(1), LoadPlan(name="closed", concurrency=1))
        time.sleep(2.4)
        with pytest.raises(LoadFailed, match=r"stopped answering under load: [\w .]+\. Did the server end\?"):
            sender.run(server.address, work(1), LoadPlan(name="closed", concurrency=1))


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        ({"interventions": [{"sae": "a", "features": [1], "op": "ablate"}]}, "does not say that any edit"),
        ({"readings": {"sae": "a", "features": [1]}}, "without the readings"),
    ],
)
def test_an_answer_that_does_not_say_what_was_done_is_not_timed(steering: dict[str, Any], said: str) -> None:
    server = Impatient()  # it knows nothing of steering, and answers all the same
    with OpenAILoad(None, 30) as sender:
        with pytest.raises(LoadFailed, match=said):
            sender.run(server.address, work(4, bodies=(None, steering)), LoadPlan(name="closed", concurrency=2))
        sender.run(server.address, work(4), LoadPlan(name="closed", concurrency=2))
