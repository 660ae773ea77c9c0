"""Names in a profiler's trace."""

import torch
from torch.profiler import profile

from sae_steer_kernels import FEATURE_EDIT, traced
from sae_steer_kernels._regions import region
from sae_steer_kernels.feature_edit import feature_edit


@traced("sae_steer::test_add")
def add(a: int, *, b: int) -> int:
    """Adds."""
    return a + b


def names(recorded: profile) -> list[str]:
    return [event.name for event in recorded.events() or []]


def test_a_traced_function_is_itself() -> None:
    assert add(1, b=2) == 3
    assert (add.__name__, add.__doc__) == ("add", "Adds.")


def test_only_what_runs_under_a_profiler_is_recorded() -> None:
    with profile() as recorded:
        torch.ones(2).sum()
    add(1, b=2)
    assert "sae_steer::test_add" not in names(recorded)
    with profile() as recorded:
        assert add(1, b=2) == 3
    assert names(recorded).count("sae_steer::test_add") == 1


def test_without_a_profiler_nothing_is_made() -> None:
    assert region("a") is region("b")


def test_the_edit_has_its_name() -> None:
    assert FEATURE_EDIT.generate is not None
    call = FEATURE_EDIT.generate(0, torch.device("cpu"))
    with profile() as recorded:
        feature_edit(**call)
    assert "sae_steer::feature_edit" in names(recorded)
    call["active"].fill_(False)
    with profile() as recorded:
        feature_edit(**call)
    assert "sae_steer::feature_edit" not in names(recorded)  # an idle step runs nothing
