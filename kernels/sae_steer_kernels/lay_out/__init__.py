"""``lay_out``: which slot, selectors and run each token of a step has, from where the requests are in its batch.

An implementation takes a :class:`StepTokens` and a sequence of :class:`BucketTokens`, of the buckets in use, and fills
their results; a request is in one bucket at most. It runs once a step and before the model, never in a graph, so that
torch need not know it as an op. All of its numbers are whole: each implementation says exactly what the reference says.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_steer_kernels._op import Op, lazily
from sae_steer_kernels.lay_out.reference import lay_out_reference
from sae_steer_kernels.lay_out.torch_impl import lay_out_torch


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The tokens of a step, and what is so of them whichever bucket their request is in. ``R`` requests.

    Args:
        starts: ``[>= R + 1]`` where each request's tokens start in the step; beyond the last one's are nobody's.
        positions: ``[T]`` absolute positions.
        ids: ``[T]`` token ids.
        vocabulary: An id outside it counts as the nearest one within.
        request: Result, ``[T]`` int64: number of the token's request; R for nobody's.
        absolute: Result, ``[T]`` int64: the positions.
        known: Result, ``[T]`` int64: the ids, within the vocabulary.
        bits: Result, ``[T]`` int32: selectors that hold.
        wanted: Result, ``[T]`` bool: whether anything is read of the token; None = nothing is read in the step.
    """

    starts: Tensor
    positions: Tensor
    ids: Tensor
    vocabulary: int
    request: Tensor
    absolute: Tensor
    known: Tensor
    bits: Tensor
    wanted: Tensor | None


@dataclass(frozen=True, slots=True)
class BucketTokens:
    """The running requests of a bucket, and what is so of a step's tokens in it. ``N`` rows, the first nobody's.

    Args:
        rows: ``[R + 1]`` int64: the row of each request of the batch, 0 where it is not of this bucket; at last a 0.
        slot: ``[N]`` int32 slot of each row.
        seen: ``[N]`` int64 the last position that was computed before; with this step, when it is laid out.
        starts: ``[N, P]`` int64 rising: from which position on each mask holds, the first from 0.
        masks: ``[N, P]`` int32 selectors.
        reads: ``[N]`` int32 selectors on whose tokens something is read.
        by_token: ``[S, V]`` int32: the selectors of each slot that a token id allows.
        slots: Result, ``[T]`` int32: slot of each token on which any selector holds; 0 of others.
        counted: Result, ``[T]`` int64: row of each such token that was not computed before; 0 of others.
    """

    rows: Tensor
    slot: Tensor
    seen: Tensor
    starts: Tensor
    masks: Tensor
    reads: Tensor
    by_token: Tensor
    slots: Tensor
    counted: Tensor


LAY_OUT = Op(
    name="lay_out",
    reference=lay_out_reference,
    implementations={
        "torch": lay_out_torch,
        "numba": lazily("sae_steer_kernels.lay_out.numba_impl", "lay_out_numba"),
    },
    # Numba comes with vLLM. Some thirty operations on a few tokens each are dispatched in plain torch.
    by_device={"cpu": "numba" if importlib.util.find_spec("numba") else "torch", "cuda": "torch"},
    tolerances={torch.int64: 0.0, torch.int32: 0.0, torch.bool: 0.0},
    host_free=frozenset({"torch"}),
)
