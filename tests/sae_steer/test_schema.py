"""The ``steering`` field is strict and closed: what is well formed survives unchanged, all else is refused by name."""

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sae_steer import schema
from sae_steer.errors import SchemaError
from sae_steer.schema import Profile, parse_profile, parse_steering, steering_json_schema
from sae_steer.strict_json import loads
from tests.sae_steer.helpers import Json, documents, edit, interventions, names, steering, vector_edit

PUBLISHED = jsonschema_rs.validator_for(steering_json_schema())
HERE = "steering.interventions[0]"


def refusal(document: object) -> SchemaError:
    with pytest.raises(SchemaError) as caught:
        parse_steering(document)
    return caught.value


# ------------------------------------------------------------------------------------------- what is well formed


@settings(max_examples=60)
@given(documents())
def test_a_valid_document_loses_and_changes_nothing(document: Json) -> None:
    steered = parse_steering(document)
    assert steered.model_dump(exclude_unset=True) == document
    assert parse_steering(json.loads(steered.model_dump_json())) == steered
    assert parse_steering(loads(json.dumps(document))) == steered


@settings(max_examples=60)
@given(documents())
def test_a_valid_document_fits_the_published_schema(document: Json) -> None:
    PUBLISHED.validate(document)


@settings(max_examples=60)
@given(st.fixed_dictionaries({"name": names, "interventions": st.lists(interventions(), min_size=1, max_size=3)}))
def test_a_profile_survives_being_stored(document: Json) -> None:
    profile = parse_profile(document)
    assert parse_profile(json.loads(profile.model_dump_json(exclude_defaults=True))) == profile


def test_nothing_is_a_valid_document() -> None:
    assert parse_steering({}).interventions == []


@pytest.mark.parametrize("name", ["a", "0", "res-12_x.y", "A" * 128])
def test_names(name: str) -> None:
    assert parse_steering(steering(edit(sae=name))).interventions[0].sae == name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    ["", "..", ".a", "-a", "_a", "../x", "a/b", "a\\b", "a b", "a\n", "a\x00", "ä", "a\ud800", "A" * 129, "a:b"],
)
def test_names_that_are_not_names(name: str) -> None:
    assert refusal(steering(edit(sae=name))).param == f"{HERE}.sae"
    assert refusal({"profiles": ["ok", name]}).param == "steering.profiles[1]"
    with pytest.raises(SchemaError):
        parse_profile({"name": name, "interventions": [edit()]})


# ------------------------------------------------------------------------------------------- what is refused


def _short(value: object) -> str:
    return repr(value)[:24]


NOT_NUMBERS = [True, False, "1", "1.0", "", None, {}, float("nan"), float("inf"), float("-inf"), 10**400, 1.1e12]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=_short)
def test_values_must_be_bounded_numbers(value: object) -> None:
    assert refusal(steering(edit() | {"value": value})).param == f"{HERE}.value"
    assert refusal(steering(edit(op="scale") | {"value": value})).param == f"{HERE}.value"
    assert refusal(steering(vector_edit() | {"value": value})).param == f"{HERE}.value"
    gate = {"sae": "r1", "feature": 1, "above": value, "below": 2}
    if value is not None:
        assert refusal(steering(edit(when=gate))).param == f"{HERE}.when.above"


@pytest.mark.parametrize("value", [v for v in NOT_NUMBERS if v is not None], ids=_short)
def test_a_bad_value_among_many_is_named_by_its_place(value: object) -> None:
    assert refusal(steering(edit(features=[1, 2], value=[1.0, value]))).param == f"{HERE}.value[1]"


@pytest.mark.parametrize("feature", [True, "1", 1.0, 1.5, -1, 2**31, 10**400, None], ids=_short)
def test_features_must_be_whole_numbers(feature: object) -> None:
    assert refusal(steering(edit(features=[1, feature]))).param == f"{HERE}.features[1]"


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"colour": 1}, "steering.colour"),
        ({"Profiles": []}, "steering.Profiles"),
        ({"on-dose": 1}, "steering.on-dose"),
        ({"float": 1}, "steering.float"),
        (steering(edit(colour=1)), f"{HERE}.colour"),
        (steering(edit(skipBos=True)), f"{HERE}.skipBos"),
        (steering(edit(**{"skip-bos": True})), f"{HERE}.skip-bos"),
        (steering(edit(op="ablate", value=1)), f"{HERE}.value"),
        (steering(edit(op="scale", units="raw")), f"{HERE}.units"),
        (steering(vector_edit(sae="r1")), f"{HERE}.sae"),
        (steering(edit(when={"token_in": [1], "colour": 1})), f"{HERE}.when.colour"),
        (steering(edit(when={"token_in": [1], "Above": 1})), f"{HERE}.when.Above"),
        (steering(edit(positions={"ranges": [[0, 1]], "colour": 1})), f"{HERE}.positions.colour"),
        ({"dose": {"limit": 1, "colour": 1}}, "steering.dose.colour"),
        ({"readings": {"sae": "r1", "colour": 1}}, "steering.readings.colour"),
        ({"readings": {"sae": "r1", "positions": {"ranges": [[0, 1]], "x": 1}}}, "steering.readings.positions.x"),
        ({"on": [{"sae": "r1", "feature": 1, "above": 1, "action": "stop", "x": 1}]}, "steering.on[0].x"),
    ],
)
def test_unknown_keys_are_named_by_their_path(document: Json, param: str) -> None:
    error = refusal(document)
    assert (error.code, error.param) == ("unknown_field", param)


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ([], "steering"),
        ("calm", "steering"),
        (None, "steering"),
        ({"interventions": {}}, "steering.interventions"),
        ({"interventions": [edit()] * 257}, "steering.interventions"),
        ({"profiles": ["a"] * 17}, "steering.profiles"),
        ({"override": 1}, "steering.override"),
        ({"error": "lose"}, "steering.error"),
        ({"dose": {"limit": 0}}, "steering.dose.limit"),
        ({"dose": {"limit": True}}, "steering.dose.limit"),
        ({"dose": {"limit": 1, "on_dose": "shrug"}}, "steering.dose.on_dose"),
        (steering(edit(sae=7)), f"{HERE}.sae"),
        (steering(edit(features=[])), f"{HERE}.features"),
        (steering(edit(value=[])), f"{HERE}.value"),
        (steering(edit(units="metres")), f"{HERE}.units"),
        (steering(vector_edit(units="reference_max")), f"{HERE}.units"),
        (steering(edit(skip_bos=1)), f"{HERE}.skip_bos"),
        (steering(edit(positions="everywhere")), f"{HERE}.positions"),
        (steering(edit(when={"token_in": []})), f"{HERE}.when.token_in"),
        (steering(edit(when={"token_in": [-1]})), f"{HERE}.when.token_in[0]"),
        (steering(edit(op="app", features=None, value=None, calibration="c", concept="")), f"{HERE}.concept"),
        (steering({"op": "clamp", "value": 1, "features": [1]}), f"{HERE}.sae"),
    ],
)
def test_wrong_kinds_and_ranges_are_named_by_their_path(document: object, param: str) -> None:
    assert refusal(document).param == param


@pytest.mark.parametrize(
    "when",
    [{}, {"sae": "r1"}, {"feature": 1}, {"above": 1}, {"sae": "r1", "feature": 1}, {"sae": "r1", "above": 1},
     {"feature": 1, "below": 1}, {"sae": "r1", "token_in": [1]}],
)  # fmt: skip
def test_a_gate_is_whole_or_an_error(when: Json) -> None:
    assert refusal(steering(edit(when=when))).param == f"{HERE}.when"


@pytest.mark.parametrize(
    ("ranges", "hint"),
    [([], "at least 1"), ([[1]], "at least 2"), ([[1, 2, 3]], "at most 2"), ([[5, 5]], "half-open"),
     ([[5, 3]], "half-open"), ([[-1, 3]], "greater than or equal"), ([[0, 1]] * 65, "at most 64")],
)  # fmt: skip
def test_bad_ranges_are_refused_for_what_is_wrong_with_them(ranges: object, hint: str) -> None:
    error = refusal(steering(edit(positions={"ranges": ranges})))
    assert error.param is not None
    assert error.param.startswith(f"{HERE}.positions")
    assert hint in error.message


def test_a_range_upside_down_is_refused() -> None:
    assert refusal(steering(edit(op="mask_range", value=None, lo=2, hi=1))).param == HERE


@pytest.mark.parametrize("op", ["multiply", "CLAMP", "", 7, None, ["clamp"], {}])
def test_unknown_ops(op: object) -> None:
    error = refusal(steering(edit() | {"op": op}))
    assert error.code == "unknown_op"
    assert error.param is not None
    assert error.param.startswith(HERE)


@pytest.mark.parametrize("op", ["gain", "mask_range", "app"])
def test_ops_that_no_vector_takes(op: str) -> None:
    refusal(steering(vector_edit(op=op)))


def test_messages_can_be_sent_whatever_was_received() -> None:
    error = refusal({"\ud800": 1})
    json.dumps([error.message, error.param], ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["calm", "res-12", "Res", "float"])
def test_a_fault_below_a_name_is_found_by_the_name(name: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse_profile({"name": "calm", "interventions": [edit()], "saes": {name: 5}})
    assert caught.value.param == f"profile.saes.{name}"


# ------------------------------------------------------------------------------------------- the published schema


def _objects(value: Any) -> list[Json]:
    """Every schema of an object inside a JSON Schema."""
    found = [value] if isinstance(value, dict) and ("properties" in value or value.get("type") == "object") else []
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found + [entry for child in children for entry in _objects(child)]


def test_the_published_schema_is_closed_everywhere() -> None:
    objects = [o for o in _objects(steering_json_schema()) if isinstance(o.get("properties"), dict)]
    models = [m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    stored = (schema.Closed, Profile, schema.ProfileBody, schema.CalibrationInfo, BaseModel)
    public = [m for m in models if not m.__name__.startswith("_") and m not in stored]
    assert {o["title"] for o in objects} == {m.__name__ for m in public}
    assert all(o["additionalProperties"] is False for o in objects)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inside for place in _places(child, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new(value)
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _replaced(value[key], tuple(rest), new)
    return copy


def _spoil(value: Any) -> Any:
    """A value of a kind that never fits where the given one does."""
    match value:
        case bool():
            return 1
        case int() | float():
            return str(value)
        case str():
            return 7
        case list():
            return {"0": 1}
    return {**value, "colour": 1}


@settings(max_examples=80)
@given(documents(), st.data())
def test_a_spoilt_document_is_refused_here_and_by_the_published_schema(document: Json, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(_places(document)))
    spoilt = _replaced(document, place, _spoil)
    refusal(spoilt)
    assert not PUBLISHED.is_valid(spoilt)


@settings(max_examples=60)
@given(documents(), st.data())
def test_booleans_never_stand_for_numbers(document: Json, data: st.DataObject) -> None:
    document = steering(edit(value=1.0)) | document
    document["interventions"] = [edit(value=1.0), *document["interventions"]]
    numeric = [p for p in _places(document) if type(_at(document, p)) in (int, float)]
    spoilt = _replaced(document, data.draw(st.sampled_from(numeric)), lambda value: bool(value))
    refusal(spoilt)
    assert not PUBLISHED.is_valid(spoilt)


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


# ------------------------------------------------------------------------------------------- the text itself


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1,}', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        ('{"a": 1}'.encode("utf-16"), "invalid_json"),
        (b"1" * 5000, "invalid_json"),
        (b'["\\ud800"]', "invalid_unicode"),
        (b'{"\\udfff": 1}', "invalid_unicode"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'[{"b": {"a": 1, "a": 1}}]', "duplicate_key"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate_key"),
        (b"[NaN]", "non_finite_number"),
        (b"[Infinity]", "non_finite_number"),
        (b"[-Infinity]", "non_finite_number"),
        (b"[1e999]", "non_finite_number"),
        (b"[-1e999]", "non_finite_number"),
        (b"[" * 33 + b"]" * 33, "too_deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "too_deep"),
        (b"[" * 200_000, "too_deep"),
        (b"[" * 200_000 + b"]" * 200_000, "too_deep"),
    ],
    ids=_short,
)
def test_text_that_is_refused(text: bytes, code: str) -> None:
    with pytest.raises(SchemaError) as caught:
        loads(text)
    assert caught.value.code == code
    assert caught.value.status == 400


def test_nesting_up_to_the_limit_is_read() -> None:
    assert loads("[" * 31 + "]" * 31) is not None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=20,
    )
)
def test_json_is_read_as_it_stands(value: object) -> None:
    assert loads(json.dumps(value)) == value


@settings(max_examples=50)
@given(st.binary(max_size=60))
def test_bytes_are_read_or_refused(text: bytes) -> None:
    code = None
    try:
        loads(text)
    except SchemaError as error:
        code = error.code
    assert code in {None, "invalid_json", "duplicate_key", "non_finite_number", "too_deep", "invalid_unicode"}
