"""The edit as one opaque op inside vLLM's compiled graph.

The graph holds a site's name and nothing else of ours, as vLLM's own attention op holds the name of its layer: tables,
maps and programs may change between steps without a new graph, and one op a site is all that an idle server pays.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Editor(Protocol):
    """What is found under a site's name while the model runs."""

    def edit(self, y: Tensor, read: Tensor | None, residual: Tensor | None) -> None:
        """Edits ``y [T, D]`` in place; ``read`` and ``residual`` as in :func:`sae_steer_kernels.feature_edit`."""
        ...


_find: list[Callable[[str], Editor]] = []


def found_by(find: Callable[[str], Editor]) -> None:
    """Says how an editor is found by its name in the running forward pass."""
    _find[:] = [find]


@torch.library.custom_op("sae_steer::edit_site", mutates_args=("y",))
def _edit_site(y: Tensor, read: Tensor | None, residual: Tensor | None, site: str) -> None:
    _find[0](site).edit(y, read, residual)


@_edit_site.register_fake
def _(y: Tensor, read: Tensor | None, residual: Tensor | None, site: str) -> None:
    return None


def edit_site(y: Tensor, site: str, *, read: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Edits the tensor at a site in place, as the running step asks.

    Args:
        y: ``[T, D_out]`` what is written.
        site: The site's name.
        read: ``[T, D]`` what is encoded, where it is not ``y``.
        residual: ``[T, D]`` added to what is encoded.
    """
    torch.ops.sae_steer.edit_site(y, read, residual, site)
