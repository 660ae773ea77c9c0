"""Who sends the requests: vLLM's own generator takes requests that differ from servers that store profiles alone."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sae_steer_bench import load_vllm
from sae_steer_bench.cases import Cases
from sae_steer_bench.connect import Servers, generator
from sae_steer_bench.launch import Launched, Port
from sae_steer_bench.load import Address
from sae_steer_bench.load_openai import OpenAILoad
from sae_steer_bench.load_vllm import VllmLoad
from sae_steer_bench.target import facts_of
from sae_steer_http.client import Server
from sae_steer_server.settings import Settings
from tests.bench.conftest import ADMIN_KEY, options
from tests.server.conftest import Served

pytestmark = pytest.mark.skipif(load_vllm.command() is None, reason="vLLM is not installed")
HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def storing(base_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server like ``served`` that has a folder for profiles."""
    server = Served(replace(base_settings, admin_key=ADMIN_KEY, profiles=tmp_path_factory.mktemp("profiles")))
    yield server
    server.stop()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Launched]:
    """A process that a run has started."""
    port = Port(None)
    argv = [sys.executable, "-c", HEALTHY, str(port.number)]
    with Launched(argv, {}, port=port, log=tmp_path / "process.log", timeout=60) as launched:
        yield launched


def servers(served: Served, *launched: Launched, admin_key: str | None = ADMIN_KEY) -> Servers:
    """A server with the same routes as vLLM's, which says that it is one."""
    with closing(Server(served.url, None, 60)) as server:
        facts = facts_of(server, None).model_copy(update={"host": "vllm"})
    return Servers(Address(served.url, facts.model), None, facts, None, admin_key, launched, 60)


def profiles(served: Served) -> list[str]:
    with served.http() as client:
        return [entry["name"] for entry in client.get("/v1/steering/profiles").json()["data"]]


def test_what_the_server_says_is_the_obstacle(served: Served) -> None:
    there = servers(served)
    program = Cases(there.facts, 2, 1.0).program()
    with VllmLoad("unused", None, ADMIN_KEY, 60) as sender:
        said = str(sender.obstacle(there.steered, (None, program)))
        assert "HTTP 403: This server has no folder of its own for profiles" in said
        assert said.endswith("--generator openai.")
        assert sender.obstacle(there.steered, (program,)) is None
    with VllmLoad("unused", None, "wrong", 60) as sender:
        assert "HTTP 401: The admin key is missing or wrong" in str(sender.obstacle(there.steered, (None, program)))
    with VllmLoad("unused", None, ADMIN_KEY, 60) as sender:
        nobody = Address("http://127.0.0.1:9", "m")
        assert "does not answer where profiles are stored" in str(sender.obstacle(nobody, (None, program)))


def test_profiles_are_stored_for_the_while(storing: Served) -> None:
    there = servers(storing)
    cases = Cases(there.facts, 2, 1.0)
    with VllmLoad("unused", None, ADMIN_KEY, 60) as sender:
        assert sender.obstacle(there.steered, [cases.program(number) for number in range(3)]) is None
        assert len(profiles(storing)) == 3
    assert profiles(storing) == []


def test_a_launched_server_that_stores_nothing_is_measured_by_the_other(
    served: Served, storing: Served, process: Launched, tmp_path: Path
) -> None:
    wanted = options(tmp_path, tokenizer="unused")
    said: list[str] = []
    with generator(servers(served, process), wanted, said.append) as sender:
        assert isinstance(sender, OpenAILoad)
    assert len(said) == 1
    assert said[0].startswith("the openai client sends the requests: ")
    assert "no folder of its own for profiles" in said[0]
    with generator(servers(storing, process), wanted, said.append) as sender:
        assert isinstance(sender, VllmLoad)
    # What was named, and a server that somebody else has started, are not decided upon.
    with generator(servers(served, process), replace(wanted, generator="vllm"), said.append) as sender:
        assert isinstance(sender, VllmLoad)
    with generator(servers(served), wanted, said.append) as sender:
        assert isinstance(sender, VllmLoad)
    assert len(said) == 1
