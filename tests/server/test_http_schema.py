"""The OpenAPI document is true: schemathesis sends what it allows and what it forbids, and checks every answer."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.server.conftest import Serve, Served

KEYS = {"Authorization": "Bearer open sesame", "X-Steering-Admin-Key": "admin sesame"}
WITH_INPUT = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/v1/steering/features"),
    ("POST", "/v1/steering/activations"),
    ("GET", "/v1/steering/profiles/{name}"),
    ("PUT", "/v1/steering/profiles/{name}"),
    ("DELETE", "/v1/steering/profiles/{name}"),
]
WITHOUT_INPUT = [
    ("GET", "/v1/models"),
    ("GET", "/v1/steering/saes"),
    ("GET", "/v1/steering/capabilities"),
    ("GET", "/v1/steering/schema"),
    ("GET", "/v1/steering/profiles"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def guarded(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    profiles = tmp_path_factory.mktemp("profiles")
    with serve(api_key="open sesame", admin_key="admin sesame", profiles=profiles, max_body_bytes=2**20) as running:
        yield running


@pytest.fixture(scope="module")
def document(guarded: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{guarded.url}/openapi.json")


def test_every_route_is_described(document: schemathesis.BaseSchema) -> None:
    found = [result.ok() for result in document.get_all_operations()]
    operations = [(operation.method.upper(), operation.path) for operation in found]
    assert sorted(operations) == sorted([*WITH_INPUT, *WITHOUT_INPUT])


@pytest.mark.parametrize(("method", "path"), [*WITH_INPUT, *WITHOUT_INPUT])
def test_what_is_allowed_is_answered_as_described(document: schemathesis.BaseSchema, method: str, path: str) -> None:
    # Names that must exist, and rules between fields, are not in a JSON Schema: a body of the right form may get 400.
    excluded = [positive_data_acceptance] if method in ("POST", "PUT") else []

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def answers(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=KEYS, excluded_checks=excluded)

    answers()


@pytest.mark.parametrize(("method", "path"), WITH_INPUT)
def test_what_is_forbidden_is_refused_as_described(document: schemathesis.BaseSchema, method: str, path: str) -> None:
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def answers(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=KEYS)

    answers()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_generated_answers_are_as_described(document: schemathesis.BaseSchema, path: str) -> None:
    # The names and sizes of this server in place of generated ones, so that what is checked is mostly a 200.
    here = {"model": "tiny", "n": 1, "max_tokens": 2, "stream": False, "steering": {}}
    absent = ("max_completion_tokens", "best_of", "top_logprobs", "stream_options")
    statuses: list[int] = []

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(case=document[path]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def answers(case: schemathesis.Case) -> None:
        assert isinstance(case.body, dict)
        case.body = {key: value for key, value in (case.body | here).items() if key not in absent}
        statuses.append(case.call_and_validate(headers=KEYS, excluded_checks=[positive_data_acceptance]).status_code)

    answers()
    assert 200 in statuses
