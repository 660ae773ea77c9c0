"""How a run goes, on a terminal and in a log."""

from io import StringIO

import pytest
from rich.console import Console

from sae_steer_bench.table import Display
from tests.bench.results import plan, result


def shown(*, terminal: bool) -> str:
    """What is printed of a run of five rounds."""
    file = StringIO()
    with Display(Console(file=file, force_terminal=terminal, width=220)) as display:
        display.say("starting the server")
        display.step(0, 0, 3, "one program")
        display.plan(plan())
        for number in range(1, 6):
            display.step(number, 1, 3, "plugin, nobody steers")
            display.rounds(result(1.25, number).measurements)
    return file.getvalue()


def test_on_a_terminal_the_table_grows() -> None:
    text = shown(terminal=True)
    assert "closed, 5 rounds" in text
    assert "1.250 (1.250 to 1.250)" in text
    assert "round 5" in text


def test_in_a_log_each_round_is_a_line() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "starting the server"
    assert "3 cases, 4 requests each" in lines[1]
    assert lines[2:] == [f"round {number} done" for number in range(1, 6)]


@pytest.mark.parametrize("terminal", [True, False])
def test_it_ends_with_what_ended_the_run(terminal: bool) -> None:
    file = StringIO()
    with pytest.raises(RuntimeError), Display(Console(file=file, force_terminal=terminal)):
        raise RuntimeError
