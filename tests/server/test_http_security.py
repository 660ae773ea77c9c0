"""Who may call: keys, hosts and origins, on every path there is or is not."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sae_steer_http.security import allowed_hosts
from sae_steer_server.sockets import is_local
from tests.server.conftest import Serve, Served

BEARER = {"Authorization": "Bearer open sesame"}
PROFILE = {"name": "p", "interventions": [{"sae": "last", "features": [1], "op": "ablate"}]}


@pytest.fixture(scope="module")
def served(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    profiles = tmp_path_factory.mktemp("profiles")
    with serve(
        api_key="open sesame", admin_key="admin sesame", profiles=profiles, allowed_hosts=("my.host", "b:81")
    ) as running:
        yield running


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1", "/v1/", "/v1/nowhere", "/v1/steering/schema", "/v1//models"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  x", "Bearer open", "Basic open sesame", "Bearer öpen"])
def test_v1_needs_the_key(client: httpx.Client, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    reply = client.get(path, headers=headers)
    assert code(reply) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_the_key_opens_v1(client: httpx.Client, served: Served) -> None:
    assert client.get("/v1/models", headers=BEARER).status_code == 200
    assert client.get("/v1/nowhere", headers=BEARER).status_code == 404
    assert [model.id for model in served.openai("open sesame").models.list()] == ["tiny"]


def test_watching_needs_no_key(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert "sae_steer_requests_total" in client.get("/metrics").text


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_changes_need_the_admin_key(client: httpx.Client, method: str) -> None:
    for key in (None, "", "open sesame", "admin"):
        headers = BEARER | ({} if key is None else {"X-Steering-Admin-Key": key})
        reply = client.request(method, "/v1/steering/profiles/p", headers=headers, json=PROFILE)
        assert code(reply) == (401, "invalid_api_key")
    assert client.get("/v1/steering/profiles", headers=BEARER).json()["data"] == []


def test_changes_are_off_without_an_admin_key(serve: Serve, tmp_path: Path) -> None:
    with serve(profiles=tmp_path) as running, running.http() as client:
        reply = client.put("/v1/steering/profiles/p", headers={"X-Steering-Admin-Key": ""}, json=PROFILE)
        assert code(reply) == (403, "forbidden")
        assert code(client.delete("/v1/steering/profiles/p")) == (403, "forbidden")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.me:80", "", "b", "[::2]"])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/openapi.json"])
def test_a_foreign_host_is_refused(client: httpx.Client, host: str, path: str) -> None:
    assert code(client.get(path, headers=BEARER | {"Host": host})) == (403, "forbidden")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:5", "[::1]", "[::1]:7", "my.host:80", "b:81"])
def test_a_known_host_is_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://my.host", 200),
        ("http://my.host:80", 200),
        ("https://my.host", 200),
        ("http://my.host:81", 403),
        ("http://evil.example", 403),
        ("http://my.host.evil.example", 403),
        ("null", 403),
        ("file://my.host", 403),
        ("http://[", 403),
        ("", 403),
    ],
)
def test_an_origin_must_be_the_host(client: httpx.Client, origin: str, status: int) -> None:
    reply = client.get("/health", headers={"Host": "my.host", "Origin": origin})
    assert reply.status_code == status
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_preflight_is_refused(client: httpx.Client) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=headers).status_code == 403


def test_any_host_can_be_allowed(serve: Serve) -> None:
    with serve(allowed_hosts=("*",)) as running, running.http() as client:
        assert client.get("/health", headers={"Host": "any.example"}).status_code == 200
        assert client.get("/health", headers={"Host": "any.example", "Origin": "http://b"}).status_code == 403


def test_an_ipv6_address_is_written_as_in_the_header() -> None:
    assert {"[::1]", "[fe80::1]", "a:80", "me"} <= allowed_hosts("fe80::1", ["a:80", "Me"])
    assert is_local("127.0.0.8")
    assert is_local("::1")
    assert not is_local("0.0.0.0")
