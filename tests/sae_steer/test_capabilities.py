"""Everything that a host cannot honour is refused from one table, with what, why and instead."""

from typing import get_args

import pytest

from sae_steer import schema
from sae_steer.capabilities import IN_PROCESS, TRANSFORMERS, Capabilities, Refusal
from sae_steer.catalog import Catalog
from sae_steer.errors import Unsupported
from tests.sae_steer.helpers import Json, compile_doc, edit, make_catalog, steering, vector_edit

KEYS = [row["key"] for row in IN_PROCESS.table()]
HERE = "steering.interventions[0]"
READ: Json = {"readings": {"sae": "r1", "features": [1]}}
TRIGGER: Json = {"on": [{"sae": "r1", "feature": 1, "above": 1, "action": "flag"}]}

# A document that asks for it, and the field that does.
ASKS: dict[str, tuple[Json, str]] = {
    "op.clamp": (steering(edit()), f"{HERE}.op"),
    "op.add": (steering(vector_edit()), f"{HERE}.op"),
    "op.scale": (steering(edit(op="scale")), f"{HERE}.op"),
    "op.ablate": (steering(edit(op="ablate", value=None)), f"{HERE}.op"),
    "op.floor": (steering(edit(op="floor")), f"{HERE}.op"),
    "op.cap": (steering(edit(op="cap")), f"{HERE}.op"),
    "op.mask_range": (steering(edit(op="mask_range", value=None, lo=0, hi=1)), f"{HERE}.op"),
    "op.gain": (steering(edit(op="gain")), f"{HERE}.op"),
    "op.app": (steering({"op": "app", "sae": "r1", "calibration": "cal", "concept": "rude"}), f"{HERE}.op"),
    "when": (steering(edit(when={"token_in": [1]})), f"{HERE}.when"),
    "positions": (steering(edit(positions="prompt")), f"{HERE}.positions"),
    "error.drop": (steering(edit(sae="w1"), error="drop"), "steering.error"),
    "dose": (steering(edit(), dose={"limit": 1}), "steering.dose"),
    "profiles": (steering(edit(), profiles=["calm"]), "steering.profiles"),
    "readings": (steering(edit(), **READ), "steering.readings"),
    "on": (steering(edit(), **TRIGGER), "steering.on"),
    "on.stop": ({"on": [TRIGGER["on"][0] | {"action": "stop"}]}, "steering.on[0].action"),
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.mark.parametrize("key", ASKS)
def test_a_host_that_cannot_says_what_why_and_instead(key: str, catalog: Catalog) -> None:
    document, param = ASKS[key]
    host = Capabilities("toy", [Refusal(key, "that thing", "the reason", "the other thing")])
    with pytest.raises(Unsupported) as caught:
        compile_doc(document, catalog, capabilities=host)
    assert (caught.value.code, caught.value.param) == ("unsupported", param)
    for words in (param, "that thing", "the reason", "the other thing"):
        assert words in caught.value.message


@pytest.mark.parametrize("key", [k for k in ASKS if k != "profiles"])
def test_a_host_that_can_compiles_it(key: str, catalog: Catalog) -> None:
    assert compile_doc(ASKS[key][0], catalog, capabilities=Capabilities("toy", ())) is not None


def test_every_key_that_a_request_can_ask_for_is_tried_above() -> None:
    assert set(KEYS) - {"prefix_cache", "beam_search"} == set(ASKS)


def test_every_op_of_the_schema_has_a_row() -> None:
    models = [m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, schema.Closed)]
    ops = {op for m in models if "op" in m.model_fields for op in get_args(m.model_fields["op"].annotation)}
    assert ops
    assert {f"op.{op}" for op in ops} == {key for key in KEYS if key.startswith("op.")}


@pytest.mark.parametrize("host", [IN_PROCESS, TRANSFORMERS], ids=lambda host: host.host)
def test_the_table_says_the_same_as_the_refusals(host: Capabilities) -> None:
    rows = host.table()
    assert [row["key"] for row in rows] == KEYS
    for row in rows:
        if row["supported"]:
            host.require(row["key"], param="x")
            assert row["why"] is row["instead"] is None
        else:
            with pytest.raises(Unsupported) as caught:
                host.require(row["key"], param="x")
            assert row["why"] in caught.value.message
            assert row["instead"] in caught.value.message


def test_what_this_version_does_not_do_is_said() -> None:
    assert {row["key"] for row in IN_PROCESS.table() if not row["supported"]} == {"on.stop"}


def test_a_row_for_something_unknown_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="beam_serach"):
        Capabilities("toy", [Refusal("beam_serach", "", "", "")])


def test_asking_for_something_unknown_is_a_mistake() -> None:
    with pytest.raises((KeyError, ValueError)):
        Capabilities("toy", ()).require("op.clmap", param="x")
