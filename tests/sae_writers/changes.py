"""Changes to what a writer of synthetic checkpoints makes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.sae_files import DROP


def changed(values: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """``values`` with ``changes`` over them; a change that is ``DROP`` leaves its key out."""
    return {key: value for key, value in {**values, **(changes or {})}.items() if value is not DROP}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, shuffled: bool) -> dict[str, Tensor]:
    """Tensors as they are stored, the other way round where ``shuffled``."""
    names = reversed(list(tensors)) if shuffled else list(tensors)
    return {name: tensors[name].to(dtype).contiguous() for name in names}
