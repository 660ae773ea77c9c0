"""These files run kernels in Triton's interpreter, in a process of their own.

Triton decides when it is imported whether a kernel is compiled or interpreted, so one process does one of the two.
``tests/kernels/test_interpreter.py`` starts the other; by hand: ``TRITON_INTERPRET=1 pytest tests/kernels/interp``.
"""

import os
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

# A failing example is not made smaller: at the interpreter's speed that takes longer than reading it.
hypothesis.settings.register_profile(
    "interpreter", hypothesis.settings(), phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)
hypothesis.settings.load_profile("interpreter")


@pytest.fixture(autouse=True)
def _arithmetic() -> Iterator[None]:
    # The interpreter computes with numpy, which warns of what IEEE arithmetic means to do: inf - inf is NaN.
    with np.errstate(all="ignore"):
        yield
