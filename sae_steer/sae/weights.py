"""A dictionary as views of mapped tensors, and the folds that turn its rows into canonical ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_steer.sae.record import FeatureRows

BLOCK = 4096  # rows folded at once: whole dictionaries never exist in float64


@dataclass(frozen=True, slots=True)
class Weights:
    """All F features, row-major; nothing is read from disk before its rows are.

    Args:
        enc: ``[F, D]``.
        dec: ``[F, D_out]``.
        dec_bias: ``[D_out]``.
        bias: ``[F]`` encoder bias; gated: of the gate.
        subtracts_decoder_bias: Whether the encoder sees ``N(x) - b_dec``.
        theta: ``[F]`` JumpReLU threshold.
        r_mag: ``[F]`` gated: logarithm of the magnitude's scale.
        b_mag: ``[F]`` gated: bias of the magnitude.
        decoder_norm_units: Whether pre-activations are multiplied by their decoder row's norm, and decoded without it.
    """

    enc: Tensor
    dec: Tensor
    dec_bias: Tensor
    bias: Tensor
    subtracts_decoder_bias: bool
    theta: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    decoder_norm_units: bool = False

    def rows(self, ids: Tensor) -> FeatureRows:
        """Canonical rows of ``ids``, ``[K]`` int64 within ``[0, F)``. A row's bits do not depend on the other ids."""
        return FeatureRows.concatenate([self._fold(block) for block in torch.split(ids, BLOCK)])

    def _fold(self, ids: Tensor) -> FeatureRows:
        enc, dec, bias = (_rows(whole, ids) for whole in (self.enc, self.dec, self.bias))
        if self.decoder_norm_units:
            norm = dec.norm(dim=1)
            enc, bias = enc * norm[:, None], bias * norm
            # A decoder row of zeros has zero activation in these units: it writes nothing, not nan.
            dec = dec / torch.where(norm > 0, norm, 1.0)[:, None]
        zeros = torch.zeros_like(bias)
        # Not a matrix product: BLAS orders its sums by the number of rows, and bits must not depend on that.
        shift = (enc * self.dec_bias.double()).sum(dim=1) if self.subtracts_decoder_bias else zeros
        mag_scale = zeros + 1 if self.r_mag is None else _rows(self.r_mag, ids).exp()
        mag_bias = zeros if self.b_mag is None else _rows(self.b_mag, ids) - mag_scale * shift
        rounded = enc.float()
        return FeatureRows(
            ids=ids,
            enc=rounded,
            dec=dec.float(),
            bias=(bias - shift).float(),
            theta=(zeros if self.theta is None else _rows(self.theta, ids)).float(),
            mag_scale=mag_scale.float(),
            mag_bias=mag_bias.float(),
            # Of the rounded row: adding a constant to x then cancels exactly in <w, x> - mean(x) sum(w).
            enc_sum=rounded.double().sum(dim=1).float(),
        )


def _rows(whole: Tensor, ids: Tensor) -> Tensor:
    # Plain indexing gathers by stride, so that a transposed view is not copied as a whole first.
    return whole[ids].double().contiguous()
