"""The canonical record of an SAE: what every checkpoint family is turned into, so that nothing below knows a family.

For a feature with encoder row ``w`` and the token ``x`` at the site::

    pre = <w, N(x)> + b'                       b' = b - a <w, b_dec>, a = 1 where the file subtracts b_dec
    f   = act(pre)
    y'  = y + s (f' - f) d                     s undoes the scale of N: std (LAYER_NORM), |x| / sqrt(D) (NORM_RESCALE)
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from sae_steer.sites import Site

RAW_UNITS = "raw"  # as the file's own encoder gives them
DECODER_NORM_UNITS = "decoder_norm"  # the encoder's, times the norm of the feature's decoder row: what its TopK ranks


class Activation(enum.StrEnum):
    """How ``f`` follows from the pre-activation."""

    IDENTITY = "identity"  # f = pre
    RELU = "relu"  # f = max(pre, 0)
    TANH_RELU = "tanh_relu"  # f = tanh(max(pre, 0))
    JUMPRELU = "jumprelu"  # f = max(pre, 0) where pre > theta (strictly), else 0
    GATED = "gated"  # f = max(mag_scale <w, N(x)> + mag_bias, 0) where pre > 0 (strictly), else 0
    TOPK = "topk"  # f = max(pre, 0) where fewer than k pre-activations of the dictionary exceed pre, else 0


class InputNorm(enum.StrEnum):
    """``N(x)``."""

    NONE = "none"  # x
    CENTER = "center"  # x - mean(x)
    LAYER_NORM = "layer_norm"  # (x - mean(x)) / (std(x) + 1e-5), with the unbiased std
    NORM_RESCALE = "norm_rescale"  # x sqrt(D) / |x|


@dataclass(frozen=True, slots=True)
class SaeSpec:
    """What a checkpoint says about its dictionary.

    Args:
        family: The checkpoint family, such as ``saelens``.
        architecture: The architecture, in the file's own word.
        activation: The activation.
        n_features: F.
        d_in: D, the width that is read.
        d_out: The width that is written.
        input_norm: The normalisation of the input.
        subtracts_decoder_bias: Whether the encoder sees ``N(x) - b_dec``: ``a`` above.
        k: Active features per token; TopK only.
        site: Where the SAE belongs; None where the file does not say, or not in words that are known.
        model_name: The model it was trained on, in the file's own word.
        dtype: The type in which the encoder is stored, such as ``bfloat16``.
        value_convention: In which units feature values are: ``RAW_UNITS`` or ``DECODER_NORM_UNITS``.
        notes: What was read into the file, folded or left out, in words that a user can check.
        skip: Whether the reconstruction has a term ``W_skip x`` besides: no delta involves it, and ``decode`` lacks it.
    """

    family: str
    architecture: str
    activation: Activation
    n_features: int
    d_in: int
    d_out: int
    input_norm: InputNorm
    subtracts_decoder_bias: bool
    k: int | None
    site: Site | None
    model_name: str | None
    dtype: str
    value_convention: str
    notes: tuple[str, ...]
    skip: bool = False


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """K canonical rows. Folds are computed in float64 and then rounded once.

    Args:
        ids: ``[K]`` int64, features as they were asked for.
        enc: ``[K, D]`` float32, contiguous.
        dec: ``[K, D_out]`` float32, contiguous.
        bias: ``[K]`` float32, ``b'``; gated: of the gate.
        theta: ``[K]`` float32, JumpReLU threshold; otherwise 0.
        mag_scale: ``[K]`` float32, gated: ``exp(r_mag)``; otherwise 1.
        mag_bias: ``[K]`` float32, gated: ``b_mag - a exp(r_mag) <w, b_dec>``; otherwise 0.
        enc_sum: ``[K]`` float32, ``sum_d w_d``, with which ``CENTER`` and ``LAYER_NORM`` need no normalised copy of x.
    """

    ids: Tensor
    enc: Tensor
    dec: Tensor
    bias: Tensor
    theta: Tensor
    mag_scale: Tensor
    mag_bias: Tensor
    enc_sum: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, in order; there must be at least one part."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Sae(Protocol):
    """An opened checkpoint."""

    @property
    def spec(self) -> SaeSpec:
        """What the checkpoint says about itself."""
        ...

    @property
    def fingerprint(self) -> str:
        """``sha256:...`` over the bytes of the weights and the parsed spec (its notes aside)."""
        ...

    @property
    def path(self) -> Path:
        """The folder that holds the checkpoint, or its one file where a folder holds several."""
        ...

    def rows(self, ids: Sequence[int]) -> FeatureRows:
        """The rows of some features, in the order asked for; only they are read from disk.

        Raises:
            UnknownFeature: An id outside ``[0, F)``.
            CheckpointError: A weight of these features that is not finite.
        """
        ...

    def decoder_bias(self) -> Tensor:
        """``b_dec`` as ``[D_out]`` float32; raises :class:`CheckpointError` where it is not finite."""
        ...

    def dictionary(self) -> Mapping[str, Tensor]:
        """The whole dictionary in float64 before any fold, under the same names and ways round for every family.

        ``W_enc [D, F]``, ``W_dec [F, D_out]``, ``b_dec [D_out]``, ``b_enc [F]``; gated instead of ``b_enc``:
        ``b_gate``, ``r_mag``, ``b_mag``, each ``[F]``; JumpReLU also ``threshold [F]``. For references and tests.
        """
        ...

    def raw(self) -> Mapping[str, Tensor]:
        """The file's own tensors under their own names, whole, unfolded, as float64: for references and tests."""
        ...
