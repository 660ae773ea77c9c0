"""Random, well-formed calls of ``reconstruct``."""

from typing import Any

import torch

from sae_steer_kernels._random import dictionary
from sae_steer_kernels.feature_edit.layout import Act, Norm, SlotInt


def generate(
    seed: int,
    device: torch.device,
    *,
    tokens: int = 7,
    width: int = 24,
    features: int = 150,
    act: Act = Act.TOPK,
    norm: Norm = Norm.NONE,
    topk: int = 9,
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
    width_out: int | None = None,
) -> dict[str, Any]:
    """The arguments of :func:`~sae_steer_kernels.reconstruct.reconstruct` but for ``active``, ``base`` and ``scratch``.

    There are four slots: one drops the error of SAE 0 on the tokens of one selector, one on those of two, one drops
    that of SAE 1, one nothing. The first token drops.

    Args:
        seed: Of everything random.
        device: Where all of it lives.
        tokens: ``T``.
        width: ``D``.
        features: ``F``.
        act: Of the dictionary.
        norm: Of the dictionary.
        topk: Of a TopK dictionary.
        dtype: Of the tokens.
        residual: Whether the stream comes in two parts.
        width_out: ``D_out``, where there is a tensor of its own to read.
    """
    g = torch.Generator().manual_seed(seed)
    out = width_out or width
    whole = dictionary(g, features=features, width=width, width_out=out, act=act, norm=norm, topk=topk)
    slot_int = torch.zeros(5, len(SlotInt), dtype=torch.int32)
    slot_int[1:, SlotInt.DROP_SAE] = torch.tensor([0, 0, 1, -1])
    slot_int[1:, SlotInt.DROP_SELECT] = torch.tensor([1, 3, 1, 0])
    slots, bits = (torch.randint(n, (tokens,), generator=g, dtype=torch.int32) for n in (5, 4))
    slots[:1] = bits[:1] = 1
    arguments = {
        "y": torch.randn(tokens, out, generator=g).to(dtype),
        "slots": slots,
        "bits": bits,
        "slot_int": slot_int,
        "sae": 0,
        "enc": whole.enc,
        "dec": whole.dec,
        "dec_bias": whole.dec_bias,
        "row_float": whole.row_float,
        "row_int": whole.row_int,
        "read": None if width_out is None else torch.randn(tokens, width, generator=g).to(dtype),
        "residual": torch.randn(tokens, width, generator=g).to(dtype) if residual else None,
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
