"""``topk_rank``: exact TopK membership of edited features, by counting rather than sorting.

A feature of a TopK dictionary is active if fewer than k pre-activations of the dictionary exceed its own. Only tokens
that edit, or are gated by, such a feature pay for the encode of the whole dictionary.
"""

import torch
from torch import Tensor

from sae_steer_kernels.feature_edit.layout import RowInt, SlotInt
from sae_steer_kernels.feature_edit.torch_impl import preactivations


@torch.library.custom_op("sae_steer::topk_rank", mutates_args=("rank",))
def topk_rank(
    y: Tensor,
    slots: Tensor,
    active: Tensor,
    table_enc: Tensor,
    table_float: Tensor,
    table_int: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    rank: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes, for each TopK row of each token's slot, how many other features of its SAE have a larger pre-activation.

    Args:
        y: ``[T, D_out]`` tensor that is going to be written.
        slots: ``[T]`` int32 slot of each token.
        active: ``[]`` bool on the CPU: whether any token of the step has a slot.
        table_enc: ``[S, K, D]`` encoder rows of the slots.
        table_float: ``[S, K, len(RowFloat)]``.
        table_int: ``[S, K, len(RowInt)]``.
        slot_int: ``[S, len(SlotInt)]``.
        sae: Number of this SAE at its site.
        enc: ``[F, D]`` float32, the whole encoder.
        row_float: ``[F, len(RowFloat)]``.
        row_int: ``[F, len(RowInt)]``.
        rank: ``[T, K]`` int32; entries of other rows are left alone.
        read: ``[T, D]`` what is encoded, where it is not ``y``.
        residual: ``[T, D]`` added to what is encoded.
    """
    if not bool(active):
        return
    for s in torch.unique(slots).tolist():
        used = int(slot_int[s, SlotInt.ROWS])
        ints = table_int[s, :used]
        ranked = ((ints[:, RowInt.TOPK] > 0) & (ints[:, RowInt.SAE] == sae)).nonzero().squeeze(1)
        if s == 0 or ranked.numel() == 0:
            continue
        tokens = (slots == s).nonzero().squeeze(1)
        x = (y if read is None else read)[tokens].float()
        if residual is not None:
            x = x + residual[tokens].float()
        everything, _ = preactivations(x, enc, row_float, row_int[:, RowInt.NORM])
        own, _ = preactivations(x, table_enc[s, :used], table_float[s, :used], ints[:, RowInt.NORM])
        for i in ranked.tolist():
            # The feature itself is left out of the count: the two products may round it differently.
            larger = everything > own[:, i, None]
            larger[:, int(ints[i, RowInt.FEATURE])] = False
            rank[tokens, i] = larger.sum(dim=1, dtype=rank.dtype)


@topk_rank.register_fake
def _(
    y: Tensor,
    slots: Tensor,
    active: Tensor,
    table_enc: Tensor,
    table_float: Tensor,
    table_int: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    rank: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    return None
