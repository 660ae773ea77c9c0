"""What the tensors of a weights file must be, whatever the family: there, of the right shape, and floats."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sae_steer.errors import CheckpointError, UnsupportedCheckpoint

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def check_tensors(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]], path: Path, *, needed_by: str, source: str
) -> None:
    """Refuses missing tensors, other shapes than ``wanted`` and types that are not floats.

    Args:
        tensors: What the file holds.
        wanted: Shapes by name; other tensors are nobody's concern.
        path: The file, for messages.
        needed_by: What needs the tensors, such as the architecture's name.
        source: Where the shapes are known from, such as ``cfg.json``.

    Raises:
        CheckpointError: One is missing, or has another shape.
        UnsupportedCheckpoint: One is not stored as floats.
    """
    _check_there(tensors, wanted, path, needed_by)
    for name in sorted(wanted):
        shape, right = list(tensors[name].shape), list(wanted[name])
        if shape != right:
            raise CheckpointError(f"{path}: {name} has the shape {shape}, and by {source} it should be {right}.")
        _check_float(tensors[name], name, path)


def fit_shapes(
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, str],
    path: Path,
    *,
    needed_by: str,
    known: Mapping[str, int] | None = None,
    source: str = "the configuration",
) -> dict[str, int]:
    """Sizes by letter, where no configuration states all of them: the first tensor with a letter says its size.

    Args:
        tensors: What the file holds.
        layout: Shapes by name in letters, such as ``{"b_enc": "F", "W_enc": "D F"}``; what comes first says the size.
        path: The file, for messages.
        needed_by: What needs the tensors, such as the family's name.
        known: Sizes that are stated elsewhere.
        source: Where those are stated.

    Raises:
        CheckpointError: A tensor is missing, or its shape does not fit.
        UnsupportedCheckpoint: One is not stored as floats.
    """
    _check_there(tensors, layout, path, needed_by)
    sizes = dict(known or {})
    said = dict.fromkeys(sizes, source)
    for name, letters in layout.items():
        shape, axes = list(tensors[name].shape), letters.split()
        right = [sizes.get(axis, axis) for axis in axes]
        if len(shape) != len(axes) or any(
            axis in sizes and sizes[axis] != n for axis, n in zip(axes, shape, strict=False)
        ):
            by = " and ".join(dict.fromkeys(said[axis] for axis in axes if axis in said)) or needed_by
            wanted = f"[{', '.join(map(str, right))}]"
            raise CheckpointError(f"{path}: {name} has the shape {shape}, and by {by} it should be {wanted}.")
        for axis, size in zip(axes, shape, strict=True):
            if axis not in sizes:
                sizes[axis], said[axis] = size, name
            if size < 1:
                raise CheckpointError(f"{path}: {name} has the shape {shape}, which is empty.")
        _check_float(tensors[name], name, path)
    return sizes


def _check_there(tensors: Mapping[str, Tensor], wanted: Mapping[str, object], path: Path, needed_by: str) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}, which {needed_by} needs. It holds {', '.join(sorted(tensors))}."
        )


def _check_float(tensor: Tensor, name: str, path: Path) -> None:
    if tensor.dtype not in DTYPES:
        raise UnsupportedCheckpoint(f"{path}: {name} is stored as {tensor.dtype}, which is not read here.")
