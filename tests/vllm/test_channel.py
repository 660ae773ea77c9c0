"""What goes between the processes: one request's values among those of all, and nothing of vLLM's own."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sae_steer.runs import FAILED
from sae_steer_vllm.channel import ASK, ERROR, RESERVED, SUMS, Snapshot, payload_of, take

lengths = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(2, 6), max_size=5)


def snapshot(lengths: dict[str, int], failed: frozenset[str] = frozenset()) -> Snapshot:
    ends = dict(zip(lengths, np.cumsum(list(lengths.values())).tolist(), strict=True))
    values = [np.arange(length) + 100.0 * i for i, length in enumerate(lengths.values())]
    for name, own in zip(lengths, values, strict=True):
        own[FAILED] = name in failed
    return Snapshot(ends, np.concatenate([np.zeros(0), *values]))


@given(lengths)
def test_slices_are_each_request_s_own(lengths: dict[str, int]) -> None:
    slices = snapshot(lengths).slices()
    assert {name: len(values) for name, values in slices.items()} == lengths
    assert [values[0] for values in slices.values()] == [100.0 * i for i in range(len(lengths))]
    assert list(slices) == list(lengths)


@given(lengths, st.data())
def test_who_failed(lengths: dict[str, int], data: st.DataObject) -> None:
    names = st.sets(st.sampled_from(sorted(lengths))) if lengths else st.just(set())
    failed = frozenset(data.draw(names))
    errors = dict.fromkeys(data.draw(names), ("bad_checkpoint", "x")) | {"elsewhere": ("non_finite", "y")}
    made = snapshot(lengths, failed)
    assert set(made.failed()) == failed
    made.errors.update(errors)
    assert set(made.failed()) == failed | set(errors)


def test_an_empty_snapshot() -> None:
    assert snapshot({}).slices() == {}
    assert snapshot({}).failed() == []


vllm_own = st.none() | st.dictionaries(
    st.text(max_size=8).filter(lambda key: key not in (SUMS, ERROR)), st.integers() | st.text(max_size=3), max_size=3
)


@given(vllm_own)
def test_what_is_not_the_plugin_s_is_left_alone(params: dict[str, object] | None) -> None:
    before = None if params is None else dict(params)
    mine, rest = take(params)
    assert mine == {}
    assert rest == before == params


@given(vllm_own, st.lists(st.floats(allow_nan=False), max_size=4), st.booleans())
def test_the_plugin_s_part_is_taken_out(params: dict[str, object] | None, values: list[float], failed: bool) -> None:
    payload = payload_of(np.array(values), ("dose_exceeded", "too much") if failed else None)
    given = {**(params or {}), **payload}
    mine, rest = take(given)
    assert mine == payload
    assert rest == (params or None)
    assert np.frombuffer(mine[SUMS], dtype=np.float64).tolist() == values
    assert mine.get(ERROR) == (["dose_exceeded", "too much"] if failed else None)
    assert given == {**(params or {}), **payload}  # the scheduler's own object is as it was


def test_what_there_is_to_tell() -> None:
    assert payload_of(None, None) == {}
    assert payload_of(None, ("a", "b")) == {ERROR: ["a", "b"]}
    assert list(payload_of(np.zeros(2), None)) == [SUMS]


def test_errors_travel_as_plain_data() -> None:
    """The engine's messages hold bytes, strings, numbers and lists."""
    assert json.loads(json.dumps(payload_of(None, ("code", "message")))) == {ERROR: ["code", "message"]}
    assert isinstance(payload_of(np.zeros(2), None)[SUMS], bytes)


def test_users_and_the_plugin_use_different_keys() -> None:
    assert ASK not in RESERVED
    assert len(set(RESERVED)) == len(RESERVED) == 3
    assert all(key.startswith("sae_steer") for key in (*RESERVED, SUMS, ERROR))
