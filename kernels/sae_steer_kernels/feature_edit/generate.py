"""Random but well-formed calls of ``feature_edit``, for tests and benchmarks."""

import math
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit import EditBuffers, EditTable, scratch_floats, skips_of
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.layout import Act, Norm, RowFloat, RowInt, SlotFloat, SlotInt

ACTS = [act for act in Act if act is not Act.TOPK]


def generate(
    seed: int,
    device: torch.device,
    *,
    tokens: int = 12,
    width: int = 48,
    rows: int = 5,
    slots: int = 3,
    width_out: int | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str = "plain",
) -> dict[str, Any]:
    """A call in which every scalar of the tables takes part, as keyword arguments of ``feature_edit``.

    Args:
        seed: Of everything random; the values do not depend on the device.
        device: Where the tensors live.
        tokens: ``T``.
        width: ``D``.
        rows: ``K``.
        slots: ``S``, slot 0 on top.
        width_out: ``D_out``, where it differs: the call then has a tensor of its own to read.
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
    y = normal(tokens, out).to(dtype)
    call: dict[str, Any] = {
        "y": y,
        "slots": choice(list(range(slots + 1)), tokens),
        "bits": choice([0, 1, 2, 4, 5, 7], tokens),
        "active": torch.tensor(True),
        "read": normal(tokens, width).to(dtype) if width_out is not None else None,
        "residual": normal(tokens, width).to(dtype) if variant == "residual" else None,
        "base": None,
        "rank": None,
    }
    if variant == "drop":
        call["base"] = normal(tokens, out)
        table.slot_int[:, SlotInt.DROP_SELECT] = choice([0, 1, 6], slots + 1)
    if variant == "topk":
        i[..., RowInt.ACT] = int(Act.TOPK)
        i[..., RowInt.TOPK] = 3
        call["rank"] = choice(list(range(6)), tokens, rows)
    if seed % 2:  # 0 = nothing may be left out, which is right for every slot
        for slot, rows_used in enumerate(used.tolist()):
            skips = skips_of(f[slot, :rows_used], i[slot, :rows_used], table.slot_float[slot])
            table.slot_int[slot, SlotInt.SKIPS] = int(skips)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
    buffers = EditBuffers.empty(
        tokens=tokens, rows=rows, device=device, scratch=scratch_floats(tokens, rows, width, out)
    )
    groups = TokenGroups.empty(tokens=tokens, slots=slots + 1, device=device).fill(moved["slots"], slots + 1)
    return {**moved, "active": call["active"], "table": table.to(device), "buffers": buffers, "groups": groups}
