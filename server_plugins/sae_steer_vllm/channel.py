"""What goes between the processes of one engine, beside what vLLM sends.

To the workers, in a request's ``extra_args``: the compiled program and the slot that the scheduler gave it. From the
last worker of a pipeline, on the output of a step: the sums of every steered request of the step. From the engine to
the front end, in ``EngineCoreOutput.kv_transfer_params``, the one open dictionary of that struct: a request's sums,
when it ends or may end. Sums are cumulative, so that none but the last must arrive. What is read of single tokens is
not: it goes with the next output of its request, and arrives once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_steer.runs import FAILED

ASK = "steering"
"""Key of ``extra_args`` under which users ask: the ``steering`` field, as a JSON string or (offline) an object."""
PROGRAM = "sae_steer_program"
SLOT = "sae_steer_slot"
TICKET = "sae_steer_ticket"
"""The HTTP request, of the same process, that wants to know what became of it."""
RESERVED = (PROGRAM, SLOT, TICKET)
"""Keys of ``extra_args`` that are the plugin's own; requests that bring them are refused."""
SUMS = "sae_steer_sums"
READS = "sae_steer_reads"
ERROR = "sae_steer_error"
ON_OUTPUT = "sae_steer_snapshot"
"""Attribute of a step's output."""
CARRIED = ("sae_steer_sums", "sae_steer_touched", "sae_steer_reads")
"""Tensors that go from stage to stage of a pipeline, beside the hidden states; the last where anything is read."""


_TICKET = re.compile("[0-9a-f]{32}")


def new_ticket() -> str:
    """A ticket that nobody can guess."""
    return token_hex(16)


def is_ticket(value: object) -> bool:
    """Whether a value has the form of a ticket; the front end knows which ones it gave."""
    return isinstance(value, str) and _TICKET.fullmatch(value) is not None


@dataclass(slots=True)
class Snapshot:
    """The sums of the steered requests of one step.

    Args:
        ends: For each request, where its values end in ``values``.
        values: The values of all, one after the other.
        errors: Requests that a worker could not steer: an error's code and message.
        reads: What was read of each request in this step, ``[n, 2 + W]``: position, token, and a row of
            :func:`sae_steer.read_rows.layout`.
        stops: Requests that a trigger ends.
    """

    ends: dict[str, int]
    values: NDArray[np.float64]
    errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    reads: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)

    def failed(self) -> list[str]:
        """Requests that must end with an error."""
        values = self.slices()
        return [*self.errors, *(name for name, sums in values.items() if sums[FAILED])]

    def slices(self) -> dict[str, NDArray[np.float64]]:
        """Every request's values."""
        starts = [0, *self.ends.values()]
        return {name: self.values[a:b] for (name, b), a in zip(self.ends.items(), starts, strict=False)}


def payload_of(
    values: NDArray[np.float64] | None,
    error: tuple[str, str] | None = None,
    reads: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """What the front end gets of one request."""
    payload: dict[str, Any] = {}
    if values is not None:
        payload[SUMS] = values.tobytes()
    if error is not None:
        payload[ERROR] = list(error)
    if reads is not None:
        payload[READS] = reads.tobytes()
    return payload


def take(params: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Takes the plugin's part out of ``kv_transfer_params``: the part, and what is left for vLLM."""
    if params is None:
        return {}, None
    mine = {key: params[key] for key in (SUMS, ERROR, READS) if key in params}
    if not mine:
        return {}, dict(params)
    rest = {key: value for key, value in params.items() if key not in mine}
    return mine, rest or None
