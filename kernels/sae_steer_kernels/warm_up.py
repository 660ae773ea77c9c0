"""What a first edit would compile is compiled before there is one."""

import torch

from sae_steer_kernels.feature_edit import EditBuffers, EditTable, feature_edit


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Edits one token of no consequence: no request then waits for a compiler, and what is missing shows at the start.

    Args:
        device: Where the model runs.
        dtype: Its element type.
    """
    table = EditTable.empty(slots=1, rows=1, width=2, width_out=2, dtype=dtype, device=device)
    buffers = EditBuffers.empty(tokens=1, rows=1, device=device)
    slot = torch.ones(1, dtype=torch.int32, device=device)
    feature_edit(torch.ones(1, 2, dtype=dtype, device=device), slot, slot, torch.tensor(True), table, buffers)
