"""A dictionary as views of mapped tensors, and the folds that turn its rows into canonical ones."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_steer.sae.record import FeatureRows

BLOCK = 4096  # rows folded at once: whole dictionaries never exist in float64


class RowSource(Protocol):
    """What canonical rows are read from."""

    @property
    def dec_bias(self) -> Tensor:
        """``[D_out]``."""
        ...

    def rows(self, ids: Tensor) -> FeatureRows:
        """Canonical rows of ``ids``, ``[K]`` int64 within ``[0, F)``."""
        ...

    def unfolded(self) -> dict[str, Tensor]:
        """The dictionary as :meth:`sae_steer.sae.record.Sae.dictionary` states it."""
        ...


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
        input_bias: ``[D]``, subtracted from ``N(x)`` where that is another vector than ``dec_bias``; gated: none.
        enc_scale: Multiplies all of ``enc``: a scaling of the input that the file leaves to its reader.
        dec_scale: Multiplies all of ``dec``, before anything is done with its norms.
        theta_of_scaled: Whether ``theta`` is compared with the pre-activation times the norm of the decoder row, though
            the activation itself is without that norm.
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
    input_bias: Tensor | None = None
    enc_scale: float = 1.0
    dec_scale: float = 1.0
    theta_of_scaled: bool = False

    def rows(self, ids: Tensor) -> FeatureRows:
        """Canonical rows of ``ids``, ``[K]`` int64 within ``[0, F)``. A row's bits do not depend on the other ids."""
        return FeatureRows.concatenate([self._fold(block) for block in torch.split(ids, BLOCK)])

    def unfolded(self) -> dict[str, Tensor]:
        """All of it in float64, before any fold; names as :meth:`sae_steer.sae.record.Sae.dictionary` states them."""
        named = {"W_enc": self.enc.T, "W_dec": self.dec, "b_dec": self.dec_bias}
        if self.r_mag is not None and self.b_mag is not None:
            named |= {"b_gate": self.bias, "r_mag": self.r_mag, "b_mag": self.b_mag}
        else:
            named |= {"b_enc": self.bias}
        if self.theta is not None:
            named |= {"threshold": self.theta}
        whole = {name: tensor.to(torch.float64, copy=True) for name, tensor in named.items()}
        whole["W_enc"] *= self.enc_scale
        whole["W_dec"] *= self.dec_scale
        if self.theta_of_scaled:
            whole["threshold"] /= whole["W_dec"].norm(dim=1)
        if self.input_bias is not None:
            whole["b_enc"] -= self.input_bias.double() @ whole["W_enc"]
        return whole

    def _fold(self, ids: Tensor) -> FeatureRows:
        enc, dec, bias = (_rows(whole, ids) for whole in (self.enc, self.dec, self.bias))
        enc, dec = enc * self.enc_scale, dec * self.dec_scale
        norm = dec.norm(dim=1)
        if self.decoder_norm_units:
            enc, bias = enc * norm[:, None], bias * norm
            # A decoder row of zeros has zero activation in these units: it writes nothing, not nan.
            dec = dec / torch.where(norm > 0, norm, 1.0)[:, None]
        zeros = torch.zeros_like(bias)
        # Not a matrix product: BLAS orders its sums by the number of rows, and bits must not depend on that.
        subtracted = self.dec_bias if self.subtracts_decoder_bias else self.input_bias
        shift = zeros if subtracted is None else (enc * subtracted.double()).sum(dim=1)
        mag_scale = zeros + 1 if self.r_mag is None else _rows(self.r_mag, ids).exp()
        mag_bias = zeros if self.b_mag is None else _rows(self.b_mag, ids) - mag_scale * shift
        theta = zeros if self.theta is None else _rows(self.theta, ids)
        if self.theta_of_scaled:
            # A decoder row of zeros is below every threshold, and the largest number stands for that.
            theta = (theta / norm).clamp_max(torch.finfo(torch.float32).max)
        rounded = enc.float()
        return FeatureRows(
            ids=ids,
            enc=rounded,
            dec=dec.float(),
            bias=(bias - shift).float(),
            theta=theta.float(),
            mag_scale=mag_scale.float(),
            mag_bias=mag_bias.float(),
            # Of the rounded row: adding a constant to x then cancels exactly in <w, x> - mean(x) sum(w).
            enc_sum=rounded.double().sum(dim=1).float(),
        )


def _rows(whole: Tensor, ids: Tensor) -> Tensor:
    # Plain indexing gathers by stride, so that a transposed view is not copied as a whole first.
    return whole[ids].double().contiguous()
