"""Random, well-formed calls of ``topk_rank``."""

from typing import Any

import torch

from sae_steer_kernels._random import dictionary
from sae_steer_kernels.feature_edit import EditTable
from sae_steer_kernels.feature_edit.layout import Act, Norm, RowFloat, RowInt, SlotInt


def generate(
    seed: int,
    device: torch.device,
    *,
    tokens: int = 5,
    width: int = 24,
    features: int = 70,
    rows: int = 3,
    slots: int = 3,
    k: int = 9,
    norm: Norm = Norm.NONE,
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
    width_out: int | None = None,
) -> dict[str, Any]:
    """The arguments of :func:`~sae_steer_kernels.topk_rank.topk_rank` but for ``active`` and ``buffers``.

    Rows of the table are features of SAE 0, one in four of another SAE, and one in eight needs no rank. Slots hold from
    none to ``rows`` of them; rows beyond those in use are NaN. The first token has a row to rank. Slot 0, which means
    nothing, looks as if it were in use.

    Args:
        seed: Of everything random.
        device: Where all of it lives.
        tokens: ``T``.
        width: ``D``.
        features: ``F``.
        rows: ``K``.
        slots: ``S``, without slot 0.
        k: Of the TopK dictionary.
        norm: Of the dictionary.
        dtype: Of the tokens.
        residual: Whether the stream comes in two parts.
        width_out: ``D_out``, where there is a tensor of its own to read.
    """
    g = torch.Generator().manual_seed(seed)
    whole = dictionary(g, features=features, width=width, width_out=width_out or width, act=Act.TOPK, norm=norm, topk=k)
    table = EditTable.empty(
        slots=slots, rows=rows, width=width, width_out=width_out or width, dtype=dtype, device=torch.device("cpu")
    )
    chosen = torch.randint(features, (slots + 1, rows), generator=g)
    table.enc.copy_(whole.enc[chosen])
    table.row_float.copy_(whole.row_float[chosen])
    table.row_int.copy_(whole.row_int[chosen])
    table.row_int[..., RowInt.SAE] = (torch.rand(slots + 1, rows, generator=g) < 0.25).int()
    table.row_int[..., RowInt.TOPK] *= (torch.rand(slots + 1, rows, generator=g) >= 0.125).int()
    table.row_int[1, 0, RowInt.SAE], table.row_int[1, 0, RowInt.TOPK] = 0, k
    used = torch.randint(rows + 1, (slots + 1,), generator=g)
    used[0], used[1] = rows, max(int(used[1]), 1)
    table.slot_int[:, SlotInt.ROWS] = used.int()
    beyond = torch.arange(rows) >= used[:, None]
    table.enc[beyond] = torch.nan
    table.row_float[beyond, RowFloat.BIAS] = torch.nan
    own = torch.randint(slots + 1, (tokens,), generator=g).int()
    own[:1] = 1
    written = torch.randn(tokens, width_out or width, generator=g).to(dtype)
    arguments = {
        "y": written,
        "slots": own,
        "table": table,
        "sae": 0,
        "enc": whole.enc,
        "row_float": whole.row_float,
        "row_int": whole.row_int,
        "read": None if width_out is None else torch.randn(tokens, width, generator=g).to(dtype),
        "residual": torch.randn(tokens, width, generator=g).to(dtype) if residual else None,
    }
    movable = (torch.Tensor, EditTable)
    return {name: value.to(device) if isinstance(value, movable) else value for name, value in arguments.items()}
