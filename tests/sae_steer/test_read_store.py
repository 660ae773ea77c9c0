"""What is read goes to the host through memory of a fixed size, and comes out as it went in."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_steer.read_store import HostStore, ReadStore

CPU = torch.device("cpu")
WIDEST = 5


class LosesTheFull(ReadStore):
    """Begins anew where the piece is full."""

    def _flush(self) -> None:
        super()._flush()
        if len(self._host) > 1:
            self._host = {}


moves = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.lists(st.integers(0, 4), min_size=1, max_size=5)),
    max_size=8,
)


def play(store: HostStore | ReadStore, steps: list[Any]) -> None:
    """Two passes through one store: what was gathered, and numbers of another kind."""
    random = torch.Generator().manual_seed(1)
    for _ in range(2):
        wanted: dict[Any, list[Tensor]] = {}
        for key, rows, columns in steps:
            reported = torch.randn(12, WIDEST, generator=random)
            tokens = torch.randint(12, (rows,), generator=random)
            store.gather((key, len(columns)), reported, tokens, torch.tensor(columns))
            wanted.setdefault((key, len(columns)), []).append(reported[tokens][:, columns])
            numbers = torch.randint(-(2**31), 2**31 - 1, (rows, 2), generator=random).int()
            store.keep(key, numbers)
            wanted.setdefault(key, []).append(numbers)
            reported.fill_(float("nan"))  # another site reports to the same place
        found = store.take()
        for key, parts in wanted.items():
            whole = torch.cat(parts)
            if len(whole):
                assert found[key].dtype == whole.numpy().dtype
                assert np.array_equal(found[key], whole.numpy())
        assert not any(map(len, store.take().values())), "taken once"


@settings(max_examples=80)
@given(steps=moves, floats=st.integers(1, 60))
def test_what_does_not_fit_at_once_comes_whole(steps: list[Any], floats: int) -> None:
    play(ReadStore(widest=WIDEST, device=CPU, floats=floats), steps)
    play(HostStore(), steps)


def test_a_piece_that_is_lost_is_seen() -> None:
    steps = [("a", 9, [1, 2]), ("b", 9, [3])]
    play(ReadStore(widest=WIDEST, device=CPU, floats=12), steps)
    with pytest.raises((AssertionError, KeyError)):
        play(LosesTheFull(widest=WIDEST, device=CPU, floats=12), steps)


def test_its_memory_does_not_grow() -> None:
    store = ReadStore(widest=WIDEST, device=CPU, floats=20)
    before, place = store.nbytes, store.open("a", 1, 1).data_ptr()
    store.gather("a", torch.ones(500, WIDEST), torch.arange(500), torch.tensor([0, 3]))
    store.clear()
    assert store.nbytes == before
    assert store.open("a", 1, 1).data_ptr() == place
    store.clear()
    assert store.take() == {}, "what a pass that failed has left is nobody's"
