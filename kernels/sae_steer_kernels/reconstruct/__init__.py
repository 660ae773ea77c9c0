"""``reconstruct``: what replacing a token by its SAE reconstruction adds to it, for ``error: drop``.

Needs the whole dictionary, so it is an op of its own: only tokens that asked for it pay, and edits never do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sae_steer_kernels._call import call
from sae_steer_kernels._op import Op, lazily, torch_op, triton_obstacle
from sae_steer_kernels.reconstruct.generate import generate
from sae_steer_kernels.reconstruct.reference import reconstruct_reference
from sae_steer_kernels.reconstruct.torch_impl import reconstruct_torch
from sae_steer_kernels.topk_readout import ReadoutBuffers


@dataclass(frozen=True, slots=True)
class DropScratch:
    """What the op keeps between its launches, for one TopK dictionary.

    Args:
        wanted: ``[T]`` int32: which tokens drop the error.
        readout: Their k active features.
    """

    wanted: Tensor
    readout: ReadoutBuffers

    @classmethod
    def empty(cls, *, tokens: int, features: int, topk: int, device: torch.device) -> Self:
        """Scratch for steps of up to ``tokens`` tokens and a dictionary of ``features`` features, ``topk`` active."""
        return cls(
            wanted=torch.zeros(tokens, dtype=torch.int32, device=device),
            readout=ReadoutBuffers.empty(tokens=tokens, features=features, k=topk, device=device),
        )

    @property
    def all(self) -> list[Tensor]:
        """In the order in which the op takes them."""
        return [self.wanted, *self.readout.all]

    def first(self, tokens: int) -> Self:
        """A view for the first ``tokens`` tokens."""
        return type(self)(self.wanted[:tokens], self.readout.first(tokens))


def _run(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    active: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    scratch: Sequence[Tensor],
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    whole = (enc, dec, dec_bias, row_float, row_int)
    call(RECONSTRUCT, y.device, active, (y, slots, bits, slot_int, sae, *whole, base, scratch, read, residual))


_reconstruct = torch_op(_run, name="reconstruct", mutates=("base", "scratch"))


def reconstruct(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    active: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    *,
    scratch: DropScratch | None = None,
    read: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes ``decode(encode(x)) - y`` into ``base`` for the tokens that drop the reconstruction error of one SAE.

    Args:
        y: ``[T, D_out]`` tensor that is going to be written.
        slots: ``[T]`` int32 slot of each token.
        bits: ``[T]`` int32 selectors of each token.
        active: ``[]`` bool on the CPU: whether any token of the step has a slot. False returns at once.
        slot_int: ``[S, len(SlotInt)]``; says which tokens of a slot drop, and the error of which SAE.
        sae: Number of this SAE at its site.
        enc: ``[F, D]`` float32 encoder.
        dec: ``[F, D_out]`` float32 decoder.
        dec_bias: ``[D_out]`` float32.
        row_float: ``[F, len(RowFloat)]``.
        row_int: ``[F, len(RowInt)]``, with one ACT, one NORM and one TOPK for all features.
        base: ``[T, D_out]`` float32; only the rows of dropping tokens are written.
        scratch: For a TopK dictionary, of its k and ``T`` rows: its few active features are then found, and their
            decoder rows added. None = two matrix products. Of exact ties at the k-th place the first are members then.
        read: ``[T, D]`` what is encoded, where it is not ``y``.
        residual: ``[T, D]`` added to what is encoded and to ``y``.
    """
    kept = scratch.all if scratch is not None else []
    whole = (enc, dec, dec_bias, row_float, row_int)
    _reconstruct(y, slots, bits, active, slot_int, sae, *whole, base, kept, read, residual)


def _triton_takes(
    y: Tensor,
    slots: Tensor,
    bits: Tensor,
    slot_int: Tensor,
    sae: int,
    enc: Tensor,
    dec: Tensor,
    dec_bias: Tensor,
    row_float: Tensor,
    row_int: Tensor,
    base: Tensor,
    scratch: Sequence[Tensor],
    read: Tensor | None,
    residual: Tensor | None,
) -> str:
    if obstacle := triton_obstacle():
        return obstacle
    if not scratch:
        return "only the few features of a TopK dictionary are found without its activations, and in scratch memory"
    if not all(t.is_contiguous() for t in (slots, bits, slot_int, dec_bias, row_float, row_int, *scratch)):
        return "a table or a buffer is not contiguous"
    if any(t is not None and t.stride(-1) != 1 for t in (y, read, residual, enc, dec, base)):
        return "the elements of a row are not next to each other"
    return ""


RECONSTRUCT = Op(
    name="reconstruct",
    reference=reconstruct_reference,
    implementations={
        "torch": reconstruct_torch,
        "triton": lazily("sae_steer_kernels.reconstruct.triton_impl", "reconstruct_triton"),
    },
    by_device={"cpu": "torch", "cuda": "triton"},
    # Error of a token, as a share of the lengths that are added up, by the dtype of ``base``: two products in float32,
    # 24 bits an operation, some thousand operations, errors of random sign.
    tolerances={torch.float32: 2e-5},
    supports={"triton": _triton_takes},
    generate=generate,
    host_free=frozenset({"triton"}),
)
