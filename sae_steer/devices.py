"""Where a model can run, by the name that a person gives."""

import torch

from sae_steer.errors import StartError


def named_device(name: str) -> torch.device:
    """The device of a name such as ``cpu`` or ``cuda:1``; ``auto`` = a GPU where there is one.

    Raises:
        StartError: It is no device, or this machine has none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartError(f"--device {name!r} is not a device. Write cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise StartError(f"--device {name!r}: a model cannot run there. Write cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartError(f"--device {name}: this machine or this build of torch has no CUDA. Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartError(f"--device {name}: this machine has {torch.cuda.device_count()} of them, counted from 0.")
    return device
