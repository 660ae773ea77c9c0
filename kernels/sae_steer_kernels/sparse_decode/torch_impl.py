"""``sparse_decode`` in plain torch: the implementation for CPUs."""

import torch
from torch import Tensor


def weighted_rows(rows: Tensor, counts: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """``[t, D_out]`` float32 sums of table rows.

    Args:
        rows: ``[n]`` int64 which rows, those of one token after those of another.
        counts: ``[t]`` int64 how many each token has.
        weights: ``[n]`` float32.
        table: ``[F, D_out]``.
    """
    starts = counts.cumsum(0) - counts
    return torch.nn.functional.embedding_bag(rows, table.float(), starts, mode="sum", per_sample_weights=weights)


def sparse_decode_torch(
    ids: Tensor, values: Tensor, wanted: Tensor, dec: Tensor, out: Tensor, bias: Tensor | None
) -> None:
    """Fills ``out``; arguments as in :func:`sae_steer_kernels.sparse_decode.sparse_decode`."""
    tokens = wanted.nonzero().squeeze(1)
    if tokens.numel() == 0:
        return
    own = ids[tokens]
    held = own >= 0
    decoded = weighted_rows(own[held].long(), held.sum(dim=1), values[tokens][held], dec)
    out[tokens] = decoded if bias is None else decoded + bias
