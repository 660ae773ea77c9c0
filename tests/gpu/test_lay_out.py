"""``lay_out`` on a GPU."""

from typing import Any

import pytest
import torch

from sae_steer_kernels import LAY_OUT
from tests.kernels.properties import lay_out as properties

CHECKS = [check for name, check in vars(properties).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_properties(check: Any, gpu: torch.device) -> None:
    check(LAY_OUT.implementation(gpu), gpu)
