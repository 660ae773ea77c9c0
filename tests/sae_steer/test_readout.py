"""The largest features: in memory that was there at the start, some tokens after the other, the same."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_steer.readout import Readout, ReadoutSpace
from sae_steer.sae import open_sae
from sae_steer.tables import Whole
from tests.sae_files import write_saelens

CPU = torch.device("cpu")
WIDTH, FEATURES, MANY = 16, 70, 90_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("sae")
    write_saelens(folder, d_in=WIDTH, n_features=FEATURES, hook_name="blocks.1.hook_resid_post")
    return Whole.load(open_sae(folder), 0, CPU)


def space(tokens: int, usual: int = 4) -> ReadoutSpace:
    """For this dictionary, and for one that is narrower and has far more features."""
    return ReadoutSpace([(FEATURES, WIDTH), (MANY, 8)], usual_k=usual, most_k=FEATURES, device=CPU, tokens=tokens)


@pytest.mark.parametrize("k", [1, 4, 33, FEATURES])
@pytest.mark.parametrize("tokens", [1, 3, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_the_whole(whole: Whole, k: int, tokens: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(20, WIDTH, generator=random).to(dtype) for _ in range(2))
    rows = torch.tensor([3, 0, 19, 7, 7, 12, 1])
    for more in (None, residual):
        alone = Readout(whole, k, rows)
        alone.take(x, more)
        ids, values = alone.found()
        assert ids.shape == values.shape == (len(rows), k)
        assert (ids[:, 0] >= 0).all()
        got: list[tuple[Tensor, Tensor]] = []
        memory = space(tokens)
        for part in (memory._numbers, memory._ints):
            part.fill_(-7)  # as another readout has left it
        piecewise = Readout(whole, k, rows, memory, lambda i, v, got=got: got.append((i.clone(), v.clone())))
        piecewise.take(x, more)
        assert len(got) >= -(-len(rows) // tokens)
        assert np.array_equal(torch.cat([i for i, _ in got]).numpy(), ids)
        # A product over other rows is rounded otherwise.
        rounding = 0.0 if len(got) == 1 else 1e-6
        np.testing.assert_allclose(torch.cat([v for _, v in got]).numpy(), values, rtol=rounding, atol=rounding)


def test_more_features_of_fewer_tokens_at_once() -> None:
    memory = space(16)
    assert memory.rows(FEATURES, 4) == 16
    assert 1 <= memory.rows(FEATURES, FEATURES) < 16
    for features, k in ((FEATURES, 4), (FEATURES, FEATURES), (MANY, 4), (MANY, FEATURES)):
        rows = memory.rows(features, k)
        held = memory.buffers(rows, features, k)
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in held.all)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in held.all)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "they do not overlap"


def test_a_pass_that_does_not_come_here_finds_nothing(whole: Whole) -> None:
    ids, values = Readout(whole, 2, torch.tensor([1, 2])).found()
    assert ids.tolist() == [[-1, -1]] * 2
    assert not values.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_is_told_as_such(whole: Whole, dtype: torch.dtype, value: float) -> None:
    """Without features alone it would look like one on which nothing fires."""
    x, residual = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    for broken in (x, residual):
        sound = broken[2, 5].clone()
        broken[2, 5] = value
        readout = Readout(whole, 3, torch.tensor([1, 2, 3]))
        readout.take(x, residual)
        _, values = readout.found()
        assert np.isnan(values).all(axis=1).tolist() == [False, True, False]
        assert np.isfinite(values[[0, 2]]).all()
        broken[2, 5] = sound
