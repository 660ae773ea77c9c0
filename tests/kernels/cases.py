"""Random but well-formed steps for the edit op, and how results are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_steer_kernels import EditBuffers, EditTable, RowFloat
from sae_steer_kernels.feature_edit.generate import generate
from sae_steer_kernels.feature_edit.reference import feature_edit_reference

CPU = torch.device("cpu")


@dataclass
class Step:
    """The arguments of one call."""

    table: EditTable
    y: Tensor
    slots: Tensor
    bits: Tensor
    read: Tensor | None = None
    residual: Tensor | None = None
    base: Tensor | None = None
    rank: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.table.tensors

    @property
    def extras(self) -> dict[str, Tensor | None]:
        return {"read": self.read, "residual": self.residual, "base": self.base, "rank": self.rank}

    def buffers(self) -> EditBuffers:
        """Buffers full of NaN, so that what the op leaves unwritten shows."""
        buffers = EditBuffers.empty(tokens=self.y.shape[0], rows=self.table.enc.shape[1], device=self.y.device)
        for t in (buffers.before, buffers.after, buffers.dose):
            t.fill_(math.nan)
        buffers.flags.fill_(-1)
        return buffers

    def take(self, tokens: Tensor) -> Step:
        """The same step with its tokens chosen and reordered."""
        chosen = {name: value[tokens] if value is not None else None for name, value in self.extras.items()}
        return replace(self, y=self.y[tokens], slots=self.slots[tokens], bits=self.bits[tokens], **chosen)

    def to(self, device: torch.device) -> Step:
        """The same step on another device."""
        moved = {name: value.to(device) if value is not None else None for name, value in self.extras.items()}
        own = (self.y.to(device), self.slots.to(device), self.bits.to(device))
        return Step(self.table.to(device), *own, **moved)


def make_step(
    seed: int,
    *,
    tokens: int,
    width: int,
    rows: int,
    slots: int,
    width_out: int | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str = "plain",
) -> Step:
    """A step on the CPU in which every scalar of the tables takes part; arguments as in ``generate``."""
    call = generate(
        seed, CPU, tokens=tokens, width=width, rows=rows, slots=slots, width_out=width_out, dtype=dtype,
        variant=variant,
    )  # fmt: skip
    names = ("table", "y", "slots", "bits", "read", "residual", "base", "rank")
    return Step(**{name: call[name] for name in names})


def reference(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the definition makes of a step: y, before, after, dose, flags."""
    step = step.to(CPU)
    return feature_edit_reference(step.y, step.slots, step.bits, *step.tables, **step.extras)


def error(out: Tensor, expected: Tensor) -> float:
    """Largest error of a row relative to its length."""
    if not out.numel():
        return 0.0
    return float(((out.double().cpu() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-3)).max())


def near_a_gate(step: Step, before: Tensor, *, within: float = 1e-5) -> Tensor:
    """Tokens ``[T]`` with an activation so close to a threshold of its row that float32 may fall on its other side."""
    floats = step.table.row_float.double().cpu()[step.slots.long().cpu()]
    own = [floats[..., column] for column in (RowFloat.THETA, RowFloat.MASK_LO, RowFloat.MASK_HI)]
    # Where a gate opens or shuts stands in the row that is gated, and is the same for all but infinite bounds.
    fixed = [torch.full_like(own[0], value) for value in (-0.5, 0.7, 0.0)]
    close = (before[..., None] - torch.stack([*own, *fixed], dim=-1)).abs() < within
    return (close.any(dim=-1) & (before != 0)).any(dim=1)
