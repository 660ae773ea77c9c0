"""``topk_rank`` in plain torch: the implementation for CPUs. It counts to the end, and holds ``[t, F]`` in memory."""

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import RowInt, SlotInt
from sae_steer_kernels.feature_edit.torch_impl import preactivations


def topk_rank_torch(
    y: Tensor,
    slots: Tensor,
    table_enc: Tensor,
    table_float: Tensor,
    table_int: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    rank: Tensor,
    moments: Tensor,
    own: Tensor,
    which: Tensor,
    todo: Tensor,
    read: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Fills ``rank``; arguments as in :func:`sae_steer_kernels.topk_rank.topk_rank`."""
    for s in torch.unique(slots).tolist():
        used = int(slot_int[s, SlotInt.ROWS])
        scalars = table_int[s, :used]
        ranked = ((scalars[:, RowInt.TOPK] > 0) & (scalars[:, RowInt.SAE] == sae)).nonzero().squeeze(1)
        if s == 0 or ranked.numel() == 0:
            continue
        tokens = (slots == s).nonzero().squeeze(1)
        x = (y if read is None else read)[tokens].float()
        if residual is not None:
            x = x + residual[tokens].float()
        everything, _ = preactivations(x, enc, row_float, row_int[:, RowInt.NORM])
        own, _ = preactivations(x, table_enc[s, :used], table_float[s, :used], scalars[:, RowInt.NORM])
        for i in ranked.tolist():
            # The feature itself is left out of the count: the two products may round it differently.
            larger = everything > own[:, i, None]
            larger[:, int(scalars[i, RowInt.FEATURE])] = False
            rank[tokens, i] = larger.sum(dim=1, dtype=rank.dtype)
