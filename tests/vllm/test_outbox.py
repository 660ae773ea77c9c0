"""Readings wait beside the scheduler until they can go, in order, once, and not beyond their request."""

import numpy as np

from sae_steer.limits import Limits
from sae_steer.program import Phase, Program, Reading, Row, Selector, SiteProgram
from sae_steer.sites import Site
from sae_steer.slots import buckets_of
from sae_steer_vllm.channel import READS, SUMS, payload_of, take
from sae_steer_vllm.gate import Gate
from sae_steer_vllm.outbox import Outbox

SITE = Site.parse("resid_post.1")


def rows(*positions: int) -> np.ndarray:
    return np.array([[p, 0.0, 0.5] for p in positions])


def test_steps_without_an_output_wait_for_the_next() -> None:
    outbox = Outbox()
    outbox.put({"a": rows(0, 1), "b": rows(7)}, [])
    outbox.put({"a": rows(2)}, ["a"])
    found = outbox.take("a")
    assert found is not None
    assert found[:, 0].tolist() == [0, 1, 2]
    assert outbox.take("a") is None
    assert outbox.stops("a"), "until its next output, also where that is of a later step"
    outbox.drop("a")
    assert not outbox.stops("a")
    assert outbox.take("b") is not None


def test_a_request_that_leaves_takes_its_readings_with_it() -> None:
    program = Program(
        (SiteProgram(SITE, (Row("sha256:a", 3),)),),
        (Selector(Phase.COMPLETION),),
        readings=(Reading(SITE, "sha256:a", (0,), 0),),
    )
    gate: Gate[str] = Gate(buckets_of(Limits()))
    assert gate.enter("a", "request", program, may_end=False) is not None
    gate.outbox.put({"a": rows(4)}, ["a"])
    gate.leave("a")
    assert gate.outbox.take("a") is None
    assert not gate.outbox.stops("a")


def test_the_channel_carries_rows_to_the_bit() -> None:
    mine, rest = take({**payload_of(None, reads=rows(3, 4)), "theirs": 1})
    assert rest == {"theirs": 1}
    assert SUMS not in mine
    assert np.frombuffer(mine[READS]).reshape(-1, 3).tolist() == rows(3, 4).tolist()
