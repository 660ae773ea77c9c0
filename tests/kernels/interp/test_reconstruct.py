"""``reconstruct`` in Triton, interpreted."""

import pytest
import torch

from sae_steer_kernels import Act
from sae_steer_kernels.reconstruct.generate import generate
from tests.kernels.properties import reconstruct as properties

CPU = torch.device("cpu")
CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check) -> None:
    check("triton", CPU)


def test_other_dictionaries_are_refused() -> None:
    with pytest.raises(LookupError, match="only the few features of a TopK dictionary"):
        properties.run(generate(1, CPU, act=Act.RELU), "triton")
