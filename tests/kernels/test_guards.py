"""The guard bands see what they are for."""

import pytest
import torch

from tests.kernels.guards import BAND, Guards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 4), (0, 6)])
def test_a_copy_is_the_tensor_and_may_be_written(shape: tuple[int, ...], gap: int, dtype: torch.dtype) -> None:
    guards, t = Guards(), torch.randn(shape).mul(9).to(dtype)
    copy = guards.copy(t, gap=gap)
    assert torch.equal(copy, t)
    copy.zero_()
    guards.check()


@pytest.mark.parametrize("where", [-1, 6, 8, 4 * 9])
def test_a_write_beside_it_is_seen(where: int) -> None:
    guards = Guards()
    copy = guards.copy(torch.zeros(4, 6), gap=3)
    memory = torch.as_strided(copy, (1,), (1,), BAND + where)
    assert memory.isnan().all()  # what is read there spreads
    memory.fill_(1.0)
    with pytest.raises(AssertionError, match="written beside a tensor"):
        guards.check()
