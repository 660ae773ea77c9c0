"""The cases: all programs are well formed and differ, and what a server cannot do is said."""

import json

import pytest

from sae_steer.schema import parse_steering
from sae_steer_bench.cases import LAYERS, QUICK, Case, Cases
from sae_steer_bench.errors import BenchError
from sae_steer_bench.records import SaeFacts, ServerFacts

KEYS = (
    "plain idle one programs_8 programs_32 programs_64 half features_1 features_64 layers_1 layers_4 layers_all prompt "
    "completion readings_named readings_top_k"
)


def facts(layers: int, *, features: int = 1000, programs: int = 64, readings: bool = True) -> ServerFacts:
    return ServerFacts(
        host="vllm",
        version=None,
        model="m",
        saes=[
            SaeFacts(id=f"s{n}", site=f"resid_post.{n}", features=features, fingerprint=str(n), whole=n == layers - 1)
            for n in range(layers)
        ],
        limits={"max_programs": programs},
        features=["readings"] if readings else [],
        vocabulary=256,
        local=True,
    )


def cases(server: ServerFacts, concurrency: int = 64, plain: bool = True) -> dict[str, Case]:
    return {case.key: case for case in Cases(server, concurrency, 1.0).all(plain=plain)}


@pytest.mark.parametrize("layers", [1, 3, 4, 6])
@pytest.mark.parametrize("features", [1, 3, 70, 1000])
def test_programs_are_well_formed_and_differ(layers: int, features: int) -> None:
    found = cases(facts(layers, features=features))
    assert list(found) == KEYS.split()
    assert set(found) >= QUICK
    for case in found.values():
        for program in case.programs:
            parsed = parse_steering(program)
            assert parsed.interventions or parsed.readings
            for edit in program.get("interventions", ()):
                assert len(set(edit["features"])) == len(edit["features"])
                assert max(edit["features"]) < features
        assert len({json.dumps(program) for program in case.programs}) == len(case.programs)


def test_what_the_cases_vary() -> None:
    found = cases(facts(6))
    assert {key: (len(found[key].programs), found[key].edits, found[key].layers) for key in found} == {
        "plain": (0, 0, 0),
        "idle": (0, 0, 0),
        "one": (1, 8, 4),
        "programs_8": (8, 8, 4),
        "programs_32": (32, 8, 4),
        "programs_64": (64, 8, 4),
        "half": (1, 8, 4),
        "features_1": (1, 1, 1),
        "features_64": (1, 64, 4),
        "layers_1": (1, 2, 1),
        "layers_4": (1, 8, 4),
        "layers_all": (1, 12, 6),
        "prompt": (1, 8, 4),
        "completion": (1, 8, 4),
        "readings_named": (1, 0, 0),
        "readings_top_k": (1, 0, 0),
    }
    assert found["half"].bodies[1] is None
    for phase in ("prompt", "completion"):
        assert {edit["positions"] for edit in found[phase].programs[0]["interventions"]} == {phase}
    assert all(case.obstacle is None for case in found.values())
    assert found["one"].label == "one program for all: 8 features at 4 layers"


def test_a_second_sae_of_a_place_is_no_further_layer() -> None:
    server = facts(1)
    twice = server.model_copy(update={"saes": [*server.saes, server.saes[0].model_copy(update={"id": "other"})]})
    assert cases(twice)["one"].layers == 1


def test_what_cannot_be_measured_says_why() -> None:
    found = cases(facts(1, programs=8, readings=False), concurrency=16, plain=False)
    why = {key: case.obstacle for key, case in found.items() if case.obstacle is not None}
    assert why.keys() == {
        "plain", "programs_32", "programs_64", "layers_4", "layers_all", "readings_named", "readings_top_k",
    }  # fmt: skip
    assert "8 slots" in why["programs_32"]
    assert "--plain-url" in why["plain"]
    assert "does not offer readings" in why["readings_named"]
    assert "1 layer only" in why[f"layers_{LAYERS}"]
    plan = found["programs_64"].plan()
    assert (plan.status, plan.reason) == ("skipped", why["programs_64"])
    assert cases(facts(1), concurrency=16)["programs_32"].obstacle.endswith("--concurrency 32")


def test_the_largest_features_are_of_an_sae_that_is_held_whole() -> None:
    server = facts(3)
    case = cases(server)["readings_top_k"]
    assert case.programs[0]["readings"]["sae"] == "s2"
    assert case.label.endswith("of 1000")
    none = server.model_copy(update={"saes": [sae.model_copy(update={"whole": False}) for sae in server.saes]})
    assert "--whole" in str(cases(none)["readings_top_k"].obstacle)
    assert cases(none)["readings_named"].obstacle is None


def test_wide_programs_have_slots_of_their_own() -> None:
    server = facts(1)
    narrow = server.model_copy(
        update={"limits": {"max_programs": 64, "max_wide_programs": 4, "max_ordinary_edits_per_site": 7}}
    )
    assert "4 slots for such programs (max_wide_programs)" in str(cases(narrow)["programs_8"].obstacle)
    fits = server.model_copy(update={"limits": narrow.limits | {"max_ordinary_edits_per_site": 8}})
    assert cases(fits)["programs_64"].obstacle is None


def test_refused_is_not_skipped() -> None:
    plan = cases(facts(4))["one"].plan("HTTP 400: too many")
    assert (plan.status, plan.reason) == ("refused", "HTTP 400: too many")


def test_a_server_without_an_sae() -> None:
    with pytest.raises(BenchError, match="has no SAE"):
        Cases(facts(0), 64, 1.0)
