"""Limits: bytes, choices at once, and clients that hang up."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.conftest import CONTEXT, Served

STEERING = {"interventions": [{"sae": "last", "features": [3], "op": "clamp", "value": 6.0}]}
LONG = {"model": "tiny", "prompt": "a", "max_tokens": CONTEXT - 2}


def gauge(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[-1])


def eventually(holds: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_a_declared_length_is_refused_before_the_body_comes(served: Served) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {10**12}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(head.encode())
        reply = connection.makefile("rb").read().decode()
    assert reply.startswith("HTTP/1.1 413")
    assert '"code": "body_too_large"' in reply


def test_a_body_without_a_length_is_read_up_to_the_limit(client: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**26:
            sent += 4096
            yield b" " * 4096

    headers = {"Content-Type": "application/json"}
    try:
        reply = client.post("/v1/completions", content=endless(), headers=headers)
        assert reply.status_code == 413
    except httpx.TransportError:
        pass  # the connection was closed under a client that went on writing: also an answer
    assert sent < 2**26


def test_chunks_just_over_the_limit_are_refused(client: httpx.Client) -> None:
    def chunks(total: int) -> Iterator[bytes]:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
        yield body
        yield b" " * (total - len(body))

    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/completions", content=chunks(16384), headers=headers).status_code == 200
    reply = client.post("/v1/completions", content=chunks(16385), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_beyond_the_choices_at_once_comes_429(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=LONG | {"n": 6, "stream": True}) as stream:
        lines = stream.iter_lines()  # kept: httpx hangs up when the iterator is dropped
        next(lines)
        reply = client.post("/v1/completions", json=LONG)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_many_requests")
        assert int(reply.headers["retry-after"]) >= 1
        streamed = client.post("/v1/completions", json=LONG | {"stream": True})
        assert streamed.status_code == 429, "a stream that cannot begin has a status, too"
    assert eventually(lambda: gauge(client, "sae_steer_choices_running") == 0)
    assert client.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_a_stream_that_is_closed_frees_its_slots(client: httpx.Client) -> None:
    steps = gauge(client, "sae_steer_programs_per_step_count")
    body = LONG | {"n": 2, "stream": True, "steering": STEERING}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # kept: httpx hangs up when the iterator is dropped
        next(lines)
        assert gauge(client, "sae_steer_slots_in_use") == 1
    assert eventually(lambda: gauge(client, "sae_steer_slots_in_use") == 0)
    assert gauge(client, "sae_steer_choices_running") == 0
    assert gauge(client, "sae_steer_programs_per_step_count") - steps < CONTEXT - 50, "it did not run to its end"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_it_waits_frees_its_slot(
    served: Served, client: httpx.Client, stream: bool
) -> None:
    steps = gauge(client, "sae_steer_programs_per_step_count")
    body = json.dumps(LONG | {"steering": STEERING, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        assert eventually(lambda: gauge(client, "sae_steer_slots_in_use") == 1)
    assert eventually(lambda: gauge(client, "sae_steer_slots_in_use") == 0)
    assert gauge(client, "sae_steer_choices_running") == 0
    assert gauge(client, "sae_steer_programs_per_step_count") - steps < CONTEXT - 50, "it did not run to its end"
    assert 'status="499"' in client.get("/metrics").text


def test_more_programs_than_slots_wait_and_are_all_answered(served: Served) -> None:
    def ask(value: int) -> tuple[str, float]:
        steering = {"interventions": [{"sae": "last", "features": [3], "op": "clamp", "value": value}]}
        with served.http() as client:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 20, "steering": steering}
            reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        feature = reply.json()["choices"][0]["steering"]["applied"]["features"][0]
        return reply.json()["steering"]["program"], feature["mean_after"]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(1, 7)))
    assert [mean for _, mean in answers] == [1, 2, 3, 4, 5, 6], "each has its own program"
    assert len({program for program, _ in answers}) == 6
    with served.http() as client:
        assert 2 <= gauge(client, "sae_steer_programs_per_step_max") <= 3, "two ordinary slots and a wide one"


def test_the_metrics_do_not_grow_with_what_clients_invent(client: httpx.Client) -> None:
    client.get("/invented-path")
    client.get("/v1/models/invented-model")
    found = client.get("/metrics").text
    assert 'sae_steer_requests_total{route="unmatched",status="404"}' in found
    assert 'sae_steer_requests_total{route="/v1/models/{model_id:path}",status="404"}' in found
    assert 'sae_steer_refusals_total{code="model_not_found"}' in found
    assert "invented" not in found
