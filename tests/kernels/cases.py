"""Random but well-formed steps for the edit op: tables, tokens, slots."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_steer_kernels import Act, EditBuffers, EditTable, Norm, RowFloat, RowInt, SlotFloat, SlotInt
from sae_steer_kernels.feature_edit import skips_of

ACTS = [act for act in Act if act is not Act.TOPK]


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
        t = self.table
        return t.enc, t.dec, t.row_float, t.row_int, t.slot_float, t.slot_int, t.gain

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

    def take(self, tokens: Tensor) -> "Step":
        """The same step with its tokens chosen and reordered."""
        chosen = {name: value[tokens] if value is not None else None for name, value in self.extras.items()}
        return replace(self, y=self.y[tokens], slots=self.slots[tokens], bits=self.bits[tokens], **chosen)


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
    """A step in which every scalar of the tables takes part.

    Args:
        seed: Of everything random.
        tokens: ``T``.
        width: ``D``.
        rows: ``K``.
        slots: ``S``.
        width_out: ``D_out``, where it differs: the step then has a tensor of its own to read.
        dtype: Of the tensor that is written.
        variant: "plain", "residual" (two-part stream), "drop" (lost reconstruction error) or "topk".
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def choice(options: list[int], *shape: int) -> Tensor:
        return torch.tensor(options, dtype=torch.int32)[torch.randint(len(options), shape, generator=g)]

    out = width_out or width
    table = EditTable.empty(
        slots=slots, rows=rows, width=width, width_out=out, dtype=dtype, device=torch.device("cpu"), gain_bins=5
    )
    table.enc.copy_(normal(*table.enc.shape) / math.sqrt(width))
    table.dec.copy_(normal(*table.dec.shape) / math.sqrt(out))
    table.gain.copy_(torch.rand(table.gain.shape, generator=g))
    f, i = table.row_float, table.row_int
    shape = f.shape[:2]
    f[..., RowFloat.BIAS] = 0.3 * normal(*shape)
    f[..., RowFloat.THETA] = 0.3 * normal(*shape)
    f[..., RowFloat.MAG_SCALE] = normal(*shape).exp()
    f[..., RowFloat.MAG_BIAS] = 0.3 * normal(*shape)
    f[..., RowFloat.ENC_SUM] = table.enc.sum(-1)
    f[..., RowFloat.SCALE] = normal(*shape)
    f[..., RowFloat.SHIFT] = normal(*shape)
    f[..., RowFloat.LO] = torch.where(normal(*shape) > 0, -math.inf, -normal(*shape).abs())
    f[..., RowFloat.HI] = torch.where(normal(*shape) > 0, math.inf, normal(*shape).abs())
    f[..., RowFloat.MASK_LO] = torch.where(normal(*shape) > 1, -0.2, math.inf)
    f[..., RowFloat.MASK_HI] = 0.5
    f[..., RowFloat.GAMMA] = torch.rand(shape, generator=g) * 2
    f[..., RowFloat.WHEN_ABOVE] = -0.5
    f[..., RowFloat.WHEN_BELOW] = torch.where(normal(*shape) > 0, math.inf, 0.7)
    f[..., RowFloat.GAIN_WIDTH_POS] = torch.where(normal(*shape) > 0, 0.3, 0.0)
    f[..., RowFloat.GAIN_WIDTH_NEG] = torch.where(normal(*shape) > 0, 0.2, 0.0)
    i[..., RowInt.ACT] = choice([int(act) for act in ACTS], *shape)
    i[..., RowInt.NORM] = choice([int(norm) for norm in Norm], *shape)
    i[..., RowInt.NORM_UNITS] = choice([0, 1], *shape)
    i[..., RowInt.SELECT] = choice([0, 1, 2, 4, 3, 7], *shape)
    used = choice(list(range(1, rows + 1)), slots + 1)
    table.slot_int[:, SlotInt.ROWS] = used
    gates = choice(list(range(-1, rows)), *shape)
    i[..., RowInt.WHEN_ROW] = torch.where(gates < used[:, None], gates, -1)
    # Limits are set apart from the doses that occur, so that no test hangs on a rounding at the limit.
    table.slot_float[:, SlotFloat.DOSE_LIMIT] = torch.where(normal(slots + 1) > 0, math.inf, 0.05)
    step = Step(
        table,
        y=normal(tokens, out).to(dtype),
        slots=choice(list(range(slots + 1)), tokens),
        bits=choice([0, 1, 2, 4, 5, 7], tokens),
    )
    if width_out is not None:
        step.read = normal(tokens, width).to(dtype)
    if variant == "residual":
        step.residual = normal(tokens, width).to(dtype)
    if variant == "drop":
        step.base = normal(tokens, out)
        table.slot_int[:, SlotInt.DROP_SELECT] = choice([0, 1, 6], slots + 1)
    if variant == "topk":
        i[..., RowInt.ACT] = int(Act.TOPK)
        i[..., RowInt.TOPK] = 3
        step.rank = choice(list(range(6)), tokens, rows)
    if seed % 2:  # 0 = nothing may be left out, which is right for every slot
        for slot, rows_used in enumerate(used.tolist()):
            skips = skips_of(f[slot, :rows_used], i[slot, :rows_used], table.slot_float[slot])
            table.slot_int[slot, SlotInt.SKIPS] = int(skips)
    return step
