"""Holds an opened SAE against a forward pass that a test writes out from the file's own tensors, feature by feature."""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from sae_steer import reference
from sae_steer.sae import Activation, FeatureRows, InputNorm, Sae, SaeSpec, open_sae
from sae_steer.sae.convert import convert

TOLERANCE = 1e-6
"""Of a feature's largest activation: twenty roundings to float32, which is what rows are kept in."""


def tokens(width: int, count: int = 48, seed: int = 1) -> Tensor:
    """``[T, D]`` float64, off centre."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * 2 + 0.7


def encode(spec: SaeSpec, rows: FeatureRows, x: Tensor) -> Tensor:
    """Activations ``[T, F]`` of ``x [T, D]`` from all canonical rows, in float64, as the record defines them."""
    dot = x @ rows.enc.double().T
    mean, enc_sum = x.mean(-1, keepdim=True), rows.enc_sum.double()
    match spec.input_norm:
        case InputNorm.CENTER:
            dot = dot - mean * enc_sum
        case InputNorm.LAYER_NORM:
            dot = (dot - mean * enc_sum) / (x.std(-1, keepdim=True) + 1e-5)
        case InputNorm.NORM_RESCALE:
            dot = dot * math.sqrt(spec.d_in) / x.norm(dim=-1, keepdim=True)
    pre = dot + rows.bias.double()
    match spec.activation:
        case Activation.RELU:
            return pre.relu()
        case Activation.TANH_RELU:
            return pre.relu().tanh()
        case Activation.JUMPRELU:
            return pre.relu() * (pre > rows.theta.double())
        case Activation.GATED:
            return (pre > 0) * (rows.mag_scale.double() * dot + rows.mag_bias.double()).relu()
        case Activation.TOPK:
            assert spec.k is not None
            return pre.relu() * ((pre[:, None, :] > pre[:, :, None]).sum(-1) < spec.k)
    raise AssertionError(spec.activation)


def decode(sae: Sae, f: Tensor, x: Tensor) -> Tensor:
    """``[T, D_out]`` of activations ``f [T, F]``, mapped back through the normalisation of ``x``."""
    decoded = f @ sae.rows(range(sae.spec.n_features)).dec.double() + sae.decoder_bias().double()
    match sae.spec.input_norm:
        case InputNorm.LAYER_NORM:
            return decoded * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        case InputNorm.NORM_RESCALE:
            return decoded * x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        case InputNorm.CENTER:
            return decoded + x.mean(-1, keepdim=True)
    return decoded


def assert_forward(sae: Sae, x: Tensor, activations: Tensor, decoded: Tensor) -> None:
    """Holds canonical rows and the reference against what a file means.

    Args:
        sae: The opened file.
        x: ``[T, D]``.
        activations: ``[T, F]``, in the units that the spec states.
        decoded: ``[T, D_out]`` of them.
    """
    assert activations.count_nonzero() > 0
    found = encode(sae.spec, sae.rows(range(sae.spec.n_features)), x)
    _assert_close(found, activations, "activations from rows")
    _assert_close(decode(sae, found, x), decoded, "decoded from rows")
    again = torch.stack([reference.encode(sae, token) for token in x])
    _assert_close(again, activations, "activations of the reference")
    _assert_close(
        torch.stack([reference.decode(sae, f, token) for f, token in zip(again, x, strict=True)]),
        decoded,
        "decoded by the reference",
    )


def _assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Equal within TOLERANCE of the largest value of each column."""
    scale = wanted.abs().amax(dim=0)
    scale = torch.where(scale > 0, scale, wanted.abs().max())
    error = ((found - wanted).abs().amax(dim=0) / scale).max()
    assert error <= TOLERANCE, f"{what} are not close: {error:.3g} of the largest value"


def assert_converts(sae: Sae, folder: Path) -> None:
    """Converts an SAE into ``folder``; the result has the same rows, to the bit, and the same meaning."""
    convert(sae, folder)
    made = open_sae(folder)
    ids = range(sae.spec.n_features)
    for field in dataclasses.fields(FeatureRows):
        assert torch.equal(getattr(sae.rows(ids), field.name), getattr(made.rows(ids), field.name)), field.name
    assert torch.equal(sae.decoder_bias(), made.decoder_bias())
    for name in ("architecture", "activation", "n_features", "d_in", "d_out", "input_norm", "k", "site"):
        assert getattr(made.spec, name) == getattr(sae.spec, name), name
    assert made.spec.value_convention == sae.spec.value_convention
