"""How an op that a step may have no need of is called."""

import torch
from torch import Tensor

from sae_steer_kernels._op import NAMESPACE, Op
from sae_steer_kernels._regions import region


def call(op: Op, device: torch.device, active: Tensor, arguments: tuple[object, ...]) -> bool:
    """Runs an op by the implementation that the device and the arguments ask for, or not at all.

    ``active`` lives on the CPU, so that reading it costs no device synchronisation, and is a tensor, so that a compiled
    graph does not bake its value in. A CUDA graph would: what may be in one launches whatever it says, and its programs
    find nothing to do.

    Returns:
        Whether it ran, and so wrote what it writes.

    Raises:
        LookupError: No implementation takes the call.
        RuntimeError: A CUDA graph is captured, and the implementation cannot be in one. Left out of it, the op would do
            nothing in any replay, and nobody would know.
    """
    asked = bool(active)
    if not asked and device.type == "cpu":
        return False
    provider = op.provider(device, *arguments)
    if provider in op.host_free:
        with region(f"{NAMESPACE}::{op.name}"):
            op.implementations[provider](*arguments)
        return True
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op.name} runs as {provider!r} here, which no CUDA graph can hold: run the model without graphs."
        )
    if asked:
        with region(f"{NAMESPACE}::{op.name}"):
            op.implementations[provider](*arguments)
    return asked
