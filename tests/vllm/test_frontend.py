"""From what a request asks to what the engine gets, and from what comes back to the report or the failure."""

import json
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sae_steer.capabilities import VLLM
from sae_steer.catalog import Catalog
from sae_steer.compiler import compile_program
from sae_steer.errors import ReadingsExceeded, RequestError, SchemaError, Unsupported
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.report import applied_block
from sae_steer.runs import FAILED, TOUCHED, columns
from sae_steer.schema import parse_steering
from sae_steer.wire import parse, to_text
from sae_steer_vllm.channel import ASK, ERROR, PROGRAM, READS, RESERVED, SUMS, TICKET, payload_of
from sae_steer_vllm.frontend import AT_ONCE, Follow, Frontend, admit
from tests.sae_steer.helpers import BOS, SITES, Json, documents, edit, make_catalog, steering, vector_edit

LIMITS = Limits(max_programs=2, rows=3, wide_programs=1, wide_rows=6, dose_limit=50.0)
GOOD = steering(edit(), vector_edit(positions="completion"))


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Frontend:
    return Frontend(make_catalog(tmp_path_factory.mktemp("catalog")), VLLM, LIMITS, SITES, BOS)


def direct(document: Json, catalog: Catalog) -> Program | None:
    return compile_program(parse_steering(document), catalog, VLLM, LIMITS, sites=SITES, bos_token_id=BOS)


def program_of(frontend: Frontend, document: Json = GOOD) -> Program:
    found = frontend.compile(document)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------- what is asked

KNOWN: dict[str, Any] = {
    "saes": st.sampled_from(["r0", "r1", "tkw", "w1", "tc"]),
    "vectors": st.sampled_from(["v", "u"]),
    "sites": st.sampled_from([str(site) for site in SITES[:3]]),
    "features": st.integers(0, 31),
}


@settings(max_examples=150)
@given(document=documents(**KNOWN) | documents())
@example(document={})
def test_it_compiles_what_the_compiler_compiles(document: Json, frontend: Frontend) -> None:
    """One schema and one compiler: what another host says to a request, this one says, as text and as an object."""
    try:
        expected: Any = direct(document, frontend.catalog)
    except RequestError as error:
        expected = (error.code, error.param)
    for asked in (document, json.dumps(document)):
        try:
            found: Any = frontend.compile(asked)
        except RequestError as error:
            found = (error.code, error.param)
        assert found == expected


@pytest.mark.parametrize("asked", [GOOD, json.dumps(GOOD)])
def test_what_the_engine_gets(asked: Any, frontend: Frontend) -> None:
    extra = {"theirs": 1, ASK: asked}
    given = admit(frontend, extra)
    assert given is not None
    assert given.keys() == {"theirs", PROGRAM}
    assert parse(given[PROGRAM]) == direct(GOOD, frontend.catalog)
    assert extra == {"theirs": 1, ASK: asked}  # the user's own object, which may be used again


@pytest.mark.parametrize("asked", [{}, "{}", {"interventions": []}])
def test_nothing_asked_is_a_plain_request(asked: Any, frontend: Frontend) -> None:
    assert admit(frontend, {"theirs": 1, ASK: asked}) == {"theirs": 1}


@pytest.mark.parametrize("extra", [None, {}, {"theirs": {"steer": 1}}])
@pytest.mark.parametrize("configured", [True, False])
def test_plain_requests_stay_as_they_are(extra: Any, configured: bool, frontend: Frontend) -> None:
    assert admit(frontend if configured else None, extra) is extra


@pytest.mark.parametrize("asked", [GOOD, {}, "{}", "garbage", None, 5])
def test_without_a_configuration_whatever_is_asked_is_refused(asked: Any) -> None:
    with pytest.raises(Unsupported, match="additional-config") as caught:
        admit(None, {ASK: asked})
    assert (caught.value.code, caught.value.param) == ("unsupported", "steering")


@pytest.mark.parametrize("key", RESERVED)
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("value", [None, "", {}])
def test_the_plugin_s_own_keys_are_nobody_else_s(key: str, configured: bool, value: Any, frontend: Frontend) -> None:
    """A program written by hand, or a slot, would go past every check there is."""
    for extra in ({key: value}, {ASK: GOOD, key: value}):
        with pytest.raises(RequestError) as caught:
            admit(frontend if configured else None, extra)
        assert (caught.value.code, caught.value.param) == ("reserved", key)


# ------------------------------------------------------------------------------------------- garbage


def nested(depth: int) -> Json:
    value: Json = {}
    for _ in range(depth):
        value = {"interventions": [value]}
    return value


BAD: list[tuple[Any, str]] = [
    ("", "invalid_json"),
    ("steer me", "invalid_json"),
    ("{", "invalid_json"),
    ("{'interventions': []}", "invalid_json"),
    ("\ud800", "invalid_json"),
    ('{"profiles": ["\\ud800"]}', "invalid_unicode"),
    ('{"profiles": [], "profiles": []}', "duplicate_key"),
    ('{"dose": {"limit": NaN}}', "non_finite_number"),
    ('{"dose": {"limit": 1e999}}', "non_finite_number"),
    ("[" * 10**5, "too_deep"),
    ("[" * 10**5 + "]" * 10**5, "too_deep"),
    (json.dumps(nested(40)), "too_deep"),
    ("null", "invalid_steering"),
    ("[]", "invalid_steering"),
    ('"{}"', "invalid_steering"),
    ("1", "invalid_steering"),
    ("true", "invalid_steering"),
    (None, "invalid_steering"),
    (1, "invalid_steering"),
    (True, "invalid_steering"),
    ([], "invalid_steering"),
    (b"{}", "invalid_steering"),
    ({"nothing": 1}, "unknown_field"),
    ({"": 1}, "unknown_field"),
    ({"interventions": 5}, "invalid_steering"),
    ({"interventions": {}}, "invalid_steering"),
    ({"interventions": [[]]}, "unknown_op"),
    ({"interventions": [{"op": "explode"}]}, "unknown_op"),
    (nested(40), "unknown_op"),
    ({"dose": {"limit": float("nan")}}, "invalid_steering"),
    ({"dose": {"limit": float("inf")}}, "invalid_steering"),
    ({"dose": {"limit": "1"}}, "invalid_steering"),
    ({"override": "yes"}, "invalid_steering"),
    ({5: 1}, "invalid_steering"),
    ({None: 1}, "invalid_steering"),
    ({("a", 1): 1}, "invalid_steering"),
    ({b"profiles": []}, "invalid_steering"),
    ({"\ud800": 1}, "invalid_steering"),
    ({"profiles": ["\ud800"]}, "invalid_steering"),
    ({"profiles": ["../secret"]}, "invalid_steering"),
    ({"profiles": ["none"]}, "unknown_profile"),
    (steering(edit(sae="none")), "unknown_sae"),
    (steering(edit(op="app", value=None, features=None, calibration="c", concept="x")), "unknown_calibration"),
]


@pytest.mark.parametrize(("asked", "code"), BAD, ids=lambda v: ascii(v)[:30])
def test_garbage_is_refused_with_a_code(asked: Any, code: str, frontend: Frontend) -> None:
    with pytest.raises(RequestError) as caught:
        admit(frontend, {ASK: asked})
    assert caught.value.code == code
    assert caught.value.status == 400
    caught.value.message.encode()  # it can be sent


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["interventions", "dose", "op", "sae"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(asked=values | st.text(st.characters(), max_size=20) | values.map(repr))
def test_nothing_but_a_refusal_is_ever_raised(asked: Any, frontend: Frontend) -> None:
    try:
        found = admit(frontend, {ASK: asked})
    except RequestError as error:
        found = {"code": error.code}
    # Nothing is asked by an empty object alone.
    assert found == {} or found["code"] in {"unknown_field", "unknown_op", *(code for _, code in BAD)}


def test_objects_may_nest_as_deep_as_they_will(frontend: Frontend) -> None:
    with pytest.raises(RequestError) as caught:
        admit(frontend, {ASK: nested(5000)})
    assert caught.value.code == "unknown_op"


# ------------------------------------------------------------------------------------------- tickets


def test_a_ticket_stands_for_a_program_that_is_compiled_already(frontend: Frontend) -> None:
    program = program_of(frontend)
    with frontend.collecting(program) as (ticket, collector):
        given = admit(frontend, {"theirs": 1, ASK: ticket})
        assert given == {"theirs": 1, PROGRAM: to_text(program), TICKET: ticket}
        assert frontend.follow(given[PROGRAM], given[TICKET]).collector is collector
        assert frontend.follow(given[PROGRAM], None).collector is None
    with pytest.raises(SchemaError):
        admit(frontend, {ASK: ticket})  # it has had its day
    assert frontend.follow(given[PROGRAM], given[TICKET]).collector is None


def test_tickets_are_each_request_s_own_and_end_with_it(frontend: Frontend) -> None:
    program = program_of(frontend)
    with frontend.collecting(program) as (one, first):
        with frontend.collecting(program) as (other, second):
            assert one != other
            assert first is not second
            assert min(len(one), len(other)) >= 32  # nobody guesses it
        assert frontend.ticketed(one) is program
        assert frontend.ticketed(other) is None
    with pytest.raises(KeyError, match="boom"), frontend.collecting(program) as (ticket, _):
        raise KeyError("boom")
    assert frontend.ticketed(ticket) is None


@pytest.mark.parametrize("asked", [None, 5, {}, [], "", "0" * 32, b"x"])
def test_what_is_no_ticket(asked: Any, frontend: Frontend) -> None:
    assert frontend.ticketed(asked) is None


def test_tickets_from_several_threads(frontend: Frontend) -> None:
    program = program_of(frontend)
    seen: list[str] = []

    def take() -> None:
        for _ in range(100):
            with frontend.collecting(program) as (ticket, _):
                seen.append(ticket)
                assert frontend.ticketed(ticket) is program

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 400
    assert not any(frontend.ticketed(ticket) for ticket in seen)


# ------------------------------------------------------------------------------------------- what comes back


def sums_of(program: Program, touched: int, **at: float) -> np.ndarray:
    """The values of a request that no edit has changed anything in."""
    values = np.zeros(len(columns(program, SITES, LIMITS.rows)))
    values[TOUCHED] = touched
    values[FAILED] = at.get("failed", 0.0)
    return values


def told(program: Program, values: np.ndarray, frontend: Frontend) -> Follow:
    follow = frontend.follow(to_text(program), None)
    follow.take(payload_of(values, None))
    return follow


def test_the_block_is_that_of_the_last_values(frontend: Frontend) -> None:
    program = program_of(frontend)
    follow = told(program, sums_of(program, 3), frontend)
    follow.take(payload_of(sums_of(program, 7), None))
    follow.take({})
    block = follow.finish("r", 0)
    assert block.keys() == {"applied"}
    assert block["applied"]["tokens"] == 7
    names = [entry.get("sae", entry.get("vector")) for entry in block["applied"]["features"]]
    assert sorted(names) == ["r1", "v"]


def test_the_block_is_the_core_s(frontend: Frontend) -> None:
    program = program_of(frontend)
    follow = told(program, sums_of(program, 7), frontend)
    assert follow.sums is not None
    expected = applied_block(follow.sums.tallies(), 7, frontend.catalog.name_of)
    assert follow.finish("r", 0) == {"applied": expected}


def test_every_choice_is_collected(frontend: Frontend) -> None:
    program = program_of(frontend)
    with frontend.collecting(program) as (ticket, collector):
        blocks = {}
        for request, index in (("cmpl-x-0", 0), ("cmpl-x-0", 1), ("cmpl-x-1", 0)):
            follow = frontend.follow(to_text(program), ticket)
            follow.take(payload_of(sums_of(program, len(blocks)), None))
            blocks[request, index] = follow.finish(request, index)
        assert collector.done == blocks
        assert collector.failure is None


def test_what_a_worker_could_not_load(frontend: Frontend) -> None:
    program = program_of(frontend)
    for values in (None, sums_of(program, 0, failed=1.0)):
        with frontend.collecting(program) as (ticket, collector):
            follow = frontend.follow(to_text(program), ticket)
            follow.take(payload_of(values, ("bad_checkpoint", "the file changed")))
            assert follow.finish("r", 0) == {"error": {"code": "bad_checkpoint", "message": "the file changed"}}
            assert collector.done == {}
            assert collector.failure is not None
            assert (collector.failure.code, collector.failure.status) == ("bad_checkpoint", 500)


def test_what_an_earlier_stage_could_not_load(frontend: Frontend) -> None:
    """Its reason stays there; that it failed comes with the values."""
    program = program_of(frontend)
    block = told(program, sums_of(program, 0, failed=1.0), frontend).finish("r", 0)
    assert block["error"]["code"] == "request_failed"
    assert "could not load" in block["error"]["message"]


@pytest.mark.parametrize("code", ["a", "dose_exceeded"])
def test_one_failure_is_not_another_s(code: str, frontend: Frontend) -> None:
    """Codes belong to an error, not to its class."""
    program = program_of(frontend)
    first, second = (frontend.follow(to_text(program), None) for _ in range(2))
    first.take({ERROR: [code, "x"]})
    second.take({ERROR: ["other", "y"]})
    assert first.failure is not None
    assert first.failure.code == code


def test_one_that_ended_before_it_ran_touched_nothing(frontend: Frontend) -> None:
    block = frontend.follow(to_text(program_of(frontend)), None).finish("r", 0)
    assert (block["applied"]["tokens"], block["applied"]["features"]) == (0, [])


def test_values_are_read_as_they_were_written(frontend: Frontend) -> None:
    program = program_of(frontend)
    values = sums_of(program, 2**40)
    assert told(program, values, frontend).finish("r", 0)["applied"]["tokens"] == 2**40
    assert len(payload_of(values, None)[SUMS]) == 8 * len(values)


def reads_of(count: int, *, frontend: Frontend) -> tuple[Program, list[bytes]]:
    """A program that reads two features of every token, and what a worker sends of so many tokens, one by one."""
    program = program_of(frontend, {"readings": {"sae": "r1", "features": [1, 2], "positions": "all"}})
    return program, [np.array([position, 7, 1.0, 2.0]).tobytes() for position in range(count)]


@pytest.mark.parametrize("told", [False, True], ids=["whole", "in a stream"])
def test_tokens_that_come_one_by_one_are_all_told_and_counted(frontend: Frontend, told: bool) -> None:
    program, payloads = reads_of(AT_ONCE + 9, frontend=frontend)
    follow = frontend.follow(to_text(program), None)
    positions: list[int] = []
    for payload in payloads:
        follow.take({READS: payload})
        if told:
            [new] = follow.new_readings() or []
            positions += new["positions"]
    [reading] = follow.finish("r", 0)["readings"]
    assert positions + reading["positions"] == list(range(AT_ONCE + 9))
    assert [entry["tokens"] for entry in reading["summary"]] == [AT_ONCE + 9] * 2
    follow.budget.take(LIMITS.max_reading_values - 2 * (AT_ONCE + 9), 0)  # so much is left
    with pytest.raises(ReadingsExceeded):
        follow.budget.take(1, 0)


@pytest.mark.parametrize("left", [0, 7], ids=["at once", "at the end"])
def test_more_than_may_be_read_ends_with_an_error(frontend: Frontend, left: int) -> None:
    """Whether the tokens that are too many come while others are awaited, or with the last."""
    program, payloads = reads_of(AT_ONCE + left, frontend=frontend)
    follow = frontend.follow(to_text(program), None)
    follow.budget.take(LIMITS.max_reading_values - 2 * (AT_ONCE + left) + 1, 0)
    for payload in payloads:
        follow.take({READS: payload})
    assert (follow.failure is not None) == (not left)
    assert follow.finish("r", 0)["error"]["code"] == ReadingsExceeded.code
