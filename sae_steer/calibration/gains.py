"""From log densities to gains: ``G(bin) = 1 - sum over the asked concepts of P(concept given the bin)``, by Bayes."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sae_steer.calibration.info import CalibrationInfo
from sae_steer.calibration.record import Calibration

Prior = Literal["uniform", "target", "empirical"]


def log_prior(info: CalibrationInfo, asked: Sequence[int], prior: Prior) -> Tensor:
    """The logarithm of each concept's prior ``[C]`` float64.

    ``uniform``: all alike. ``target``: half for the asked ones, shared equally, and half for the rest, likewise.
    ``empirical``: by their numbers of documents.

    Raises:
        ValueError: There is no such prior: nothing but asked concepts, or no documents.
    """
    count = len(info.labels)
    if prior == "uniform":
        return torch.full((count,), -math.log(count), dtype=torch.float64)
    if prior == "target":
        if len(asked) == count:
            raise ValueError("all concepts are asked for, and 'target' sets them against the rest")
        weights = torch.full((count,), 0.5 / (count - len(asked)), dtype=torch.float64)
        weights[list(asked)] = 0.5 / len(asked)
        return weights.log()
    documents = torch.tensor(info.documents, dtype=torch.float64)
    if not float(documents.sum()):
        raise ValueError("the calibration counted no documents")
    return (documents / documents.sum()).log()


def gains(record: Calibration, rows: Tensor, asked: Sequence[int], prior: Tensor) -> Tensor:
    """The gain at each positive bin's centre: ``[n, B]`` float64, 1 for features that never fired.

    Args:
        record: The calibration.
        rows: ``[n]`` int64, places of the features in it.
        asked: Numbers of the concepts to take away.
        prior: ``[C]`` float64, from :func:`log_prior`.
    """
    joint = record.log_density[rows, :, 1:].double() + prior[:, None]
    posterior = joint[:, list(asked)].logsumexp(dim=1) - joint.logsumexp(dim=1)
    found = -torch.expm1(posterior.clamp(max=0.0))  # 1 - exp, and exact where the posterior is small
    return torch.where((record.fired[rows].sum(dim=1) > 0)[:, None], found, 1.0)
