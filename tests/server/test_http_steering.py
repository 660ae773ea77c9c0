"""Steering over HTTP: by the field, by the model's name, by profiles; and the routes that list what may be named."""

import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sae_steer.calibration.model import of_folder
from sae_steer.errors import StartError
from sae_steer.schema import steering_json_schema
from tests.calibrations import made_up, write_calibration
from tests.server.conftest import FEATURES, Serve, Served

ADMIN = {"X-Steering-Admin-Key": "admin sesame"}
CLAMP = {"sae": "last", "features": [3], "op": "clamp", "value": 6.0}
CALM = {"name": "calm", "interventions": [CLAMP]}
GREEDY = {"prompt": "ab", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    (folder / "calm").mkdir()
    (folder / "calm" / "profile.json").write_text(json.dumps(CALM))
    return folder


@pytest.fixture(scope="module")
def served(serve: Serve, profiles: Path) -> Iterator[Served]:
    with serve(profiles=profiles, admin_key="admin sesame") as running:
        yield running


@pytest.fixture(scope="module")
def calibrated(profiles: Path, served: Served) -> Path:
    """A calibration in the folder of the running server."""
    entry = served.state.steering.catalog.sae("last")
    record = made_up(range(FEATURES // 2), 3, largest=4.0)
    model = of_folder(Path(served.state.settings.model))
    write_calibration(profiles, "manners", entry, record, labels=("rude", "plain", "kind"), model=model)
    return profiles / "manners"


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", json={"model": "tiny"} | GREEDY | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(client: httpx.Client, **body: Any) -> tuple[str | None, str]:
    reply = client.post("/v1/completions", json={"model": "tiny"} | GREEDY | body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    return error["param"], error["code"]


def test_a_steered_answer_says_what_was_done(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json={"model": "tiny", "steering": {"interventions": [CLAMP]}} | GREEDY)
    program = reply.json()["steering"]["program"]
    assert program.startswith("sha256:")
    assert reply.headers["x-steering-program"] == program
    applied = reply.json()["choices"][0]["steering"]["applied"]
    assert applied["sites"] == ["resid_post.1"]
    # <s>, a, b and seven of the eight completion tokens pass through the model.
    assert applied["tokens"] == 10
    (feature,) = applied["features"]
    assert feature["feature"] == 3
    assert feature["sae"] == "last"
    assert feature["fired"] == 10
    assert feature["mean_after"] == 6.0
    assert reply.json()["choices"][0]["text"] != complete(client)["choices"][0]["text"]


def test_every_choice_has_its_own_block(client: httpx.Client) -> None:
    reply = complete(client, n=2, max_tokens=4, steering={"interventions": [CLAMP]})
    assert [choice["steering"]["applied"]["tokens"] for choice in reply["choices"]] == [6, 6]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_says_it_in_the_last_chunk_of_each_choice(client: httpx.Client, path: str) -> None:
    prompt = {"prompt": "ab"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "ab"}]}
    body = {"model": "tiny", "n": 2, "max_tokens": 4, "stream": True, "steering": {"interventions": [CLAMP]}} | prompt
    reply = client.post(path, json=body)
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n")[:-2]]
    assert {event["steering"]["program"] for event in events} == {reply.headers["x-steering-program"]}
    choices = [event["choices"][0] for event in events]
    last = [choice["index"] for choice in choices if choice["finish_reason"] is not None]
    assert sorted(last) == [0, 1]
    for choice in choices:
        assert ("steering" in choice) == (choice["finish_reason"] is not None)


def test_a_profile_is_a_model(client: httpx.Client, served: Served) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "tiny:calm"]
    assert client.get("/v1/models/tiny:calm").json()["id"] == "tiny:calm"
    by_field = complete(client, steering={"interventions": [CLAMP]})
    by_profile = complete(client, steering={"profiles": ["calm"]})
    by_model = complete(client, model="tiny:calm")
    assert by_model["model"] == "tiny:calm"
    for reply in (by_profile, by_model):
        assert reply["steering"] == by_field["steering"], "equal programs have equal digests, whatever names were used"
        assert reply["choices"] == by_field["choices"]
    chat = served.openai().chat.completions.create(
        model="tiny:calm", messages=[{"role": "user", "content": "a"}], max_tokens=2
    )
    assert chat.model_extra["steering"] == by_field["steering"]


def test_faults_are_named_as_the_client_wrote_them(client: httpx.Client) -> None:
    twice = {"interventions": [CLAMP]}
    assert refusal(client, model="tiny:calm", steering=twice) == ("steering.interventions[0]", "duplicate_edit")
    named = {"profiles": ["calm"]}
    assert refusal(client, model="tiny:calm", steering=named) == ("steering.profiles[0]", "duplicate_edit")
    unknown = {"profiles": ["angry"]}
    assert refusal(client, model="tiny:calm", steering=unknown) == ("steering.profiles[0]", "unknown_profile")
    overridden = complete(client, model="tiny:calm", steering=twice | {"override": True})
    assert overridden["steering"] == complete(client, steering=twice)["steering"]


@pytest.mark.parametrize(
    ("steering", "param", "code"),
    [
        ({"profiles": ["../calm"]}, "steering.profiles[0]", "invalid_steering"),
        ({"interventions": [CLAMP | {"sae": "first"}]}, "steering.interventions[0].sae", "unknown_sae"),
        ({"interventions": [CLAMP | {"features": [32]}]}, "steering.interventions[0].features[0]", "unknown_feature"),
        ({"interventions": [CLAMP | {"features": list(range(13))}]}, "steering.interventions", "limit_exceeded"),
        ({"error": "drop", "interventions": [CLAMP]}, "steering.error", "unsupported"),
        ({"readings": {"sae": "last"}, "interventions": [CLAMP]}, "steering.readings", "invalid_steering"),
        ({"readings": {"sae": "last", "top_k": 3}}, "steering.readings.top_k", "unsupported"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    client: httpx.Client, steering: dict[str, Any], param: str, code: str
) -> None:
    assert refusal(client, steering=steering) == (param, code)


def test_vectors_steer_where_a_site_is_hooked(client: httpx.Client) -> None:
    add = {"site": "resid_post.1", "vector": "honest", "op": "add", "value": 3.0}
    applied = complete(client, steering={"interventions": [add]})["choices"][0]["steering"]["applied"]
    assert applied["features"][0]["vector"] == "honest"
    elsewhere = add | {"site": "resid_post.0"}
    assert refusal(client, steering={"interventions": [elsewhere]}) == (
        "steering.interventions[0].site",
        "unknown_site",
    )


def test_saes_are_listed(client: httpx.Client, served: Served) -> None:
    (entry,) = client.get("/v1/steering/saes").json()["data"]
    assert entry.pop("fingerprint") == served.state.steering.catalog.saes["last"].sae.fingerprint
    form = {"architecture": "standard", "features": 32, "width": 64, "whole": False}
    assert entry == {"id": "last", "site": "resid_post.1"} | form


def test_features_are_searched(client: httpx.Client) -> None:
    def found(**query: str | int) -> list[int]:
        reply = client.get("/v1/steering/features", params=query)
        assert reply.status_code == 200, reply.text
        return [entry["feature"] for entry in reply.json()["data"]]

    assert found() == [3, 5]
    assert found(sae="last", q="SEA") == [3]
    assert found(limit=1) == [3]
    assert found(q="mountain") == []
    assert found(q="7") == found(q="#7") == [7], "a number finds a feature that has no label"
    assert found(q="32") == []
    assert found(sae="last", ids="5,31,3") == found(ids="5,31,3") == [5, 31, 3]
    wrong = [({"sae": "first"}, 404), ({"limit": 0}, 400), ({"limit": "x"}, 400), ({"colour": 1}, 400)]
    wrong += [({"q": "x" * 257}, 400), ({"ids": "32"}, 404), ({"ids": "3,x", "sae": "last"}, 400)]
    wrong += [({"ids": "3,32", "sae": "last"}, 404), ({"ids": ",".join(["1"] * 129), "sae": "last"}, 400)]
    for query, status in wrong:
        reply = client.get("/v1/steering/features", params=query)
        assert reply.status_code == status
        assert reply.json()["error"]["param"] == next(iter(query))


def test_a_search_of_a_megabyte_is_refused(client: httpx.Client, served: Served) -> None:
    # httpx itself would not send it
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    with contextlib.closing(connection), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("GET", "/v1/steering/features?q=" + "x" * 2**20)
        assert connection.getresponse().status in (400, 414)
    assert client.get("/v1/steering/features", params={"q": "sea"}).status_code == 200


def test_schema_and_capabilities_are_published(client: httpx.Client, served: Served) -> None:
    assert client.get("/v1/steering/schema").json() == steering_json_schema()
    reply = client.get("/v1/steering/capabilities").json()
    assert reply["data"] == served.state.steering.capabilities.table()
    assert reply["limits"]["max_edits"] == 12


def test_a_profile_is_stored_used_and_deleted(client: httpx.Client, profiles: Path) -> None:
    loud = {"name": "loud", "interventions": [CLAMP | {"value": 9.0}]}
    stored = client.put("/v1/steering/profiles/loud", json=loud, headers=ADMIN)
    assert stored.status_code == 200, stored.text
    assert client.get("/v1/steering/profiles/loud").json() == stored.json()
    assert stored.json()["interventions"][0]["value"] == 9.0
    names = [entry["name"] for entry in client.get("/v1/steering/profiles").json()["data"]]
    assert names == ["calm", "loud"]
    assert complete(client, model="tiny:loud")["choices"][0]["steering"]["applied"]["features"][0]["mean_after"] == 9.0
    deleted = client.delete("/v1/steering/profiles/loud", headers=ADMIN)
    assert deleted.json() == {"name": "loud", "deleted": True}
    for reply in (
        client.get("/v1/steering/profiles/loud"),
        client.delete("/v1/steering/profiles/loud", headers=ADMIN),
        client.get("/v1/models/tiny:loud"),
    ):
        assert reply.status_code == 404
    assert not (profiles / "loud").exists()


@pytest.mark.parametrize(
    ("name", "change", "param", "code"),
    [
        ("bad", {"interventions": [CLAMP | {"sae": "first"}]}, "interventions[0].sae", "unknown_sae"),
        ("bad", {"interventions": [CLAMP, CLAMP]}, "interventions[1]", "duplicate_edit"),
        ("bad", {"interventions": []}, "interventions", "invalid_steering"),
        ("bad", {"saes": {"last": "sha256:other"}}, "saes.last", "fingerprint_mismatch"),
        ("bad", {"saes": {"first": "sha256:other"}}, "saes.first", "unknown_sae"),
        ("bad", {"name": "../../bad"}, "name", "invalid_steering"),
        ("bad", {"name": "worse"}, "name", "invalid_request"),
        ("bad", {"colour": 1}, "colour", "unknown_field"),
    ],
)
def test_a_bad_profile_is_not_stored(
    client: httpx.Client, profiles: Path, name: str, change: dict[str, Any], param: str, code: str
) -> None:
    reply = client.put(f"/v1/steering/profiles/{name}", json=CALM | {"name": name} | change, headers=ADMIN)
    assert reply.status_code == 400, reply.text
    assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == (param, code)
    assert [entry.name for entry in profiles.iterdir()] == ["calm"]


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "calm%2fprofile.json", "%00"])
def test_a_profile_name_is_not_a_path(client: httpx.Client, name: str) -> None:
    for method in ("GET", "DELETE"):
        assert client.request(method, f"/v1/steering/profiles/{name}", headers=ADMIN).status_code in (404, 405)


def test_a_profile_that_appears_in_the_folder_is_served(client: httpx.Client, profiles: Path) -> None:
    folder = profiles / "late"
    folder.mkdir()
    (folder / "profile.json").write_text(json.dumps(CALM | {"name": "late"}))
    assert complete(client, model="tiny:late")["steering"] == complete(client, model="tiny:calm")["steering"]
    (folder / "profile.json").write_text("{")
    assert refusal(client, model="tiny:late") == ("model", "broken_profile")
    (folder / "profile.json").unlink()
    folder.rmdir()


def test_a_profile_never_hides_behind_a_served_name(serve: Serve, tmp_path: Path) -> None:
    names = ("tiny", "tiny:calm")
    edit = {"site": "resid_post.1", "vector": "honest", "op": "add", "value": 1.0}
    body = {"name": "calm", "interventions": [edit]}
    with (
        serve(served_names=names, profiles=tmp_path, admin_key="admin sesame") as running,
        running.http(headers={"X-Steering-Admin-Key": "admin sesame"}) as client,
    ):
        refused = client.put("/v1/steering/profiles/calm", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "ambiguous_model")
        (tmp_path / "calm").mkdir()
        (tmp_path / "calm" / "profile.json").write_text(json.dumps(body))
        asked = client.post("/v1/completions", json={"model": "tiny:calm", "prompt": "a", "max_tokens": 1})
        assert (asked.status_code, asked.json()["error"]["code"]) == (400, "ambiguous_model")


def test_a_broken_profile_hides_no_other(serve: Serve, tmp_path: Path) -> None:
    edit = {"site": "resid_post.1", "vector": "honest", "op": "add", "value": 1.0}
    with serve(profiles=tmp_path) as running, running.http() as client:
        for name, text in (("good", json.dumps({"name": "good", "interventions": [edit]})), ("odd", "{")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "profile.json").write_text(text)
        (tmp_path / "no name").mkdir()
        (tmp_path / "no name" / "profile.json").write_text("{}")
        entries = {entry["name"]: entry for entry in client.get("/v1/steering/profiles").json()["data"]}
        assert entries.keys() == {"good", "odd"}
        assert entries["good"]["interventions"] == 1
        assert "'odd' is broken" in entries["odd"]["error"]


APP = {"op": "app", "sae": "last", "calibration": "manners", "concept": "rude"}


@pytest.fixture
def calibration(calibrated: Path) -> Iterator[Path]:
    """The calibration's folder, which a test may spoil."""
    kept = {path.name: path.read_bytes() for path in calibrated.iterdir()}
    yield calibrated
    for name, content in kept.items():
        (calibrated / name).write_bytes(content)


def test_a_calibration_is_a_profile_a_model_and_a_word_in_an_edit(client: httpx.Client, calibration: Path) -> None:
    asked = complete(client, steering={"interventions": [APP]})
    ops = {entry["op"] for entry in asked["choices"][0]["steering"]["applied"]["features"]}
    assert ops == {"app"}
    assert complete(client, steering={"profiles": ["manners"]})["steering"] == asked["steering"]
    assert complete(client, model="tiny:manners")["steering"] == asked["steering"]
    rivals = [
        complete(client, steering={"interventions": [APP | {"op": op}]}) for op in ("ablate", "gain", "mask_range")
    ]
    assert len({answer["steering"]["program"] for answer in [asked, *rivals]}) == 4


def test_a_calibration_is_listed(client: httpx.Client, calibration: Path) -> None:
    entries = {entry["name"]: entry for entry in client.get("/v1/steering/profiles").json()["data"]}
    assert entries["manners"]["calibration"] == {
        "sae": "last",
        "site": "resid_post.1",
        "concepts": ["rude", "plain", "kind"],
        "labels": ["rude", "plain", "kind"],
    }
    assert "calibration" not in entries["calm"]
    assert client.get("/v1/steering/profiles/manners").json()["calibration"]["documents"] == [100, 200, 300]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"calibration": "calm"}, "calibration", "unknown_calibration"),
        ({"calibration": "../manners"}, "calibration", "invalid_steering"),
        ({"concept": "merry"}, "concept", "unknown_concept"),
        ({"top": 9}, "top", "out_of_range"),
        ({"top": 0}, "top", "invalid_steering"),
        ({"strength": -1}, "strength", "invalid_steering"),
        ({"prior": "flat"}, "prior", "invalid_steering"),
        ({"features": [1]}, "features", "unknown_field"),
    ],
)
def test_an_edit_by_a_calibration_that_cannot_be_honoured(
    client: httpx.Client, calibration: Path, change: dict[str, Any], param: str, code: str
) -> None:
    found = refusal(client, steering={"interventions": [APP | change]})
    assert found == (f"steering.interventions[0].{param}", code)


def test_a_calibration_that_breaks_while_the_server_runs(client: httpx.Client, calibration: Path) -> None:
    before = complete(client, steering={"interventions": [APP]})
    file, profile = calibration / "profile.safetensors", calibration / "profile.json"
    document = json.loads(profile.read_text())
    document["calibration"]["file"] = "sha256:" + "0" * 64
    profile.write_text(json.dumps(document))
    assert refusal(client, steering={"interventions": [APP]}) == (
        "steering.interventions[0].calibration",
        "broken_profile",
    )
    assert refusal(client, model="tiny:manners") == ("model.interventions[0].calibration", "broken_profile")
    file.unlink()
    assert refusal(client, model="tiny:manners") == ("model.interventions[0].calibration", "broken_profile")
    assert complete(client)["choices"]
    assert before["steering"]["program"]


def test_no_client_stores_a_calibration_or_loses_one(client: httpx.Client, calibration: Path) -> None:
    stored = client.get("/v1/steering/profiles/manners").json()
    reply = client.put("/v1/steering/profiles/mine", json=stored | {"name": "mine"}, headers=ADMIN)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "calibration")
    del stored["calibration"]
    assert client.put("/v1/steering/profiles/manners", json=stored, headers=ADMIN).status_code == 403
    reply = client.put("/v1/steering/profiles/mine", json=stored | {"name": "mine"}, headers=ADMIN)
    assert reply.status_code == 200, reply.text
    assert complete(client, model="tiny:mine")["steering"] == complete(client, model="tiny:manners")["steering"]
    assert client.delete("/v1/steering/profiles/mine", headers=ADMIN).status_code == 200


def test_a_calibration_of_another_model_refuses_the_start(serve: Serve, served: Served, tmp_path: Path) -> None:
    entry = served.state.steering.catalog.sae("last")
    record = made_up(range(6), 2)
    write_calibration(tmp_path, "foreign", entry, record, labels=("a", "b"), model="sha256:another")
    with pytest.raises(StartError, match="made for the model sha256:another"), serve(profiles=tmp_path):
        pass
