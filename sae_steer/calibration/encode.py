"""The encoder of a whole dictionary over many tokens: which features are positive, and how much."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from sae_steer.calibration.statistics import Active
from sae_steer.sae import Activation, Sae
from sae_steer.tables import pack_features, topk_of
from sae_steer_kernels import RowFloat, RowInt
from sae_steer_kernels.feature_edit.torch_impl import preactivations

_BLOCK_BYTES = 2**26


class Encoder:
    """An SAE's encoder on a device.

    Args:
        sae: The SAE.
        device: Where it computes.
    """

    def __init__(self, sae: Sae, device: torch.device) -> None:
        rows = sae.rows(range(sae.spec.n_features))
        self.spec = sae.spec
        self.features, self.width = sae.spec.n_features, sae.spec.d_in
        self._enc = rows.enc.to(device)
        self._floats, self._ints = pack_features(rows, sae, 0, device)
        self._k = topk_of(sae)
        # A feature is positive above this: pre > theta and pre > 0, or for a gate pre > 0.
        self._floor = rows.theta.clamp_min(0).to(device)

    @classmethod
    def whole(cls, sae: Sae, device: torch.device | str = "cpu") -> Self:
        """Reads the whole dictionary; raises :class:`~sae_steer.errors.CheckpointError`."""
        return cls(sae, torch.device(device))

    def preactivations(self, x: Tensor) -> Tensor:
        """``[n, F]`` float32 of tokens ``x [n, D]``; as the edits compute them."""
        return preactivations(x.float(), self._enc, self._floats, self._ints[:, RowInt.NORM])[0]

    def __call__(self, x: Tensor) -> Active:
        """What is positive on tokens ``x [n, D]``; the others are zero, or below it where codes are signed."""
        step = max(1, _BLOCK_BYTES // (4 * self.features))
        parts = [self._block(x[first : first + step], first) for first in range(0, x.shape[0], step)]
        if not parts:
            return Active(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        return Active(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def dense(self, x: Tensor, features: Tensor) -> Tensor:
        """Positive activations ``[n, k]`` of some ``features [k]`` on tokens ``x [n, D]``."""
        active = self(x)
        found = torch.zeros(x.shape[0], self.features)
        found[torch.from_numpy(active.rows), torch.from_numpy(active.features)] = torch.from_numpy(active.values)
        return found[:, features]

    def _block(self, x: Tensor, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pre = self.preactivations(x)
        positive = pre > self._floor
        if self._k:
            # Rank below k: fewer than k exceed it, so those that equal the k-th stay too.
            positive &= pre >= pre.topk(self._k, dim=1).values[:, -1:]
        rows, features = positive.nonzero(as_tuple=True)
        values = self._values(pre[rows, features], features)
        if self.spec.activation is Activation.GATED:
            alive = values > 0  # an open gate may pass a magnitude of zero
            rows, features, values = rows[alive], features[alive], values[alive]
        return (rows + first).cpu().numpy(), features.cpu().numpy(), values.cpu().numpy()

    def _values(self, pre: Tensor, features: Tensor) -> Tensor:
        match self.spec.activation:
            case Activation.TANH_RELU:
                return pre.tanh()
            case Activation.GATED:
                scalars = self._floats[features]
                dot = pre - scalars[:, RowFloat.BIAS]
                return (scalars[:, RowFloat.MAG_SCALE] * dot + scalars[:, RowFloat.MAG_BIAS]).clamp_min(0)
            case _:
                return pre
