"""What the Triton kernels cost on a GPU: the regimes of `feature_edit`, `topk_rank`, decoder stacks that carry edits.

Everything is timed inside CUDA graphs, as servers run it: a graph holds many calls, each with tables and tokens of its
own, so that what one call leaves in the cache is not there for the next, and a time is the median over replays, per
call. A regime is only timed after it has been compared with the torch implementation. Floors are bytes over the copy
bandwidth that the same run measured.

    python benchmarks/gpu_ops.py --out benchmarks/results/kernels.json
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
from decoder_stack import STACKS, stack_times
from timing import copy_bandwidth, graphed
from tqdm import tqdm

from sae_steer_kernels import (
    FEATURE_EDIT,
    TOPK_RANK,
    Act,
    EditTable,
    RowFloat,
    RowInt,
    SlotInt,
    feature_edit,
    topk_rank,
)
from sae_steer_kernels.feature_edit import EditBuffers, empty_rows, skips_of
from sae_steer_kernels.feature_edit.grouping import TokenGroups
from sae_steer_kernels.feature_edit.regimes import Regime, choose, grouped_floats, two_phase_floats
from sae_steer_kernels.feature_edit.triton_impl import feature_edit_triton
from sae_steer_kernels.topk_rank import RankBuffers

GPU = torch.device("cuda")
WIDTHS, ROWS, TOKENS = (2304, 4096, 8192), (1, 8, 64), (1, 8, 32, 256, 2048)
SLOTS = 32
DICTIONARY = 65536


def make_call(tokens: int, width: int, rows: int) -> dict[str, Any]:
    """A call whose tokens all scale JumpReLU features.

    Up to 256 tokens are a decode step, each with the slot of its own request; more are a prefill of four requests.
    """
    table = EditTable.empty(slots=SLOTS, rows=rows, width=width, width_out=width, dtype=torch.bfloat16, device=GPU)
    table.enc.normal_().div_(width**0.5)
    table.dec.normal_().div_(width**0.5)
    table.row_float[..., RowFloat.THETA] = 0.1
    table.row_float[..., RowFloat.SCALE] = 1.5
    table.row_int[..., RowInt.ACT] = int(Act.JUMPRELU)
    table.row_int[..., RowInt.SELECT] = 1
    table.slot_int[:, SlotInt.ROWS] = rows
    table.slot_int[:, SlotInt.SKIPS] = int(skips_of(table.row_float[1], table.row_int[1], table.slot_float[1]))
    slots = (
        torch.arange(tokens, device=GPU) % SLOTS if tokens <= 256 else torch.arange(tokens, device=GPU) * 4 // tokens
    )
    slots = (slots + 1).int()
    scratch = max(two_phase_floats(tokens, width), grouped_floats(tokens, rows, width, width))
    return {
        "y": torch.randn(tokens, width, device=GPU, dtype=torch.bfloat16),
        "slots": slots,
        "bits": torch.ones_like(slots),
        "table": table,
        "buffers": EditBuffers.empty(tokens=tokens, rows=rows, device=GPU, scratch=scratch),
        "groups": TokenGroups.empty(tokens=tokens, slots=SLOTS + 1, device=GPU).fill(slots, SLOTS + 1),
    }


def launch(call: dict[str, Any], regime: Regime) -> None:
    b = call["buffers"]
    feature_edit_triton(
        call["y"], call["slots"], call["bits"], *call["table"].tensors, b.before, b.after, b.dose, b.flags,
        None, None, None, None, b.scratch, call["groups"].order, call["groups"].tiles, regime=regime,
    )  # fmt: skip


# What features are scaled by while time is taken: thousands of replays edit the same tokens, which must stay finite.
CALM = 0.999


def torch_hook(call: dict[str, Any]) -> None:
    """The same edit as a hook in plain torch does it: each token's rows gathered, two batched products."""
    y, table, slots = call["y"], call["table"], call["slots"]
    x = y.float()
    pre = torch.bmm(table.enc[slots], x[:, :, None]).squeeze(2)
    f = torch.where(pre > 0.1, pre, 0)
    delta = torch.bmm(((CALM - 1) * f).to(y.dtype)[:, None], table.dec[slots]).squeeze(1)
    y.copy_((x + delta.float()).to(y.dtype))


def checked(call: dict[str, Any], regime: Regime) -> None:
    """Compares a regime with the torch implementation."""
    original = call["y"].clone()
    b = call["buffers"]
    FEATURE_EDIT.implementations["torch"](
        call["y"], call["slots"], call["bits"], *call["table"].tensors, b.before, b.after, b.dose, b.flags,
        None, None, None, None, None, None, None, False,
    )  # fmt: skip
    expected = call["y"].float()
    call["y"].copy_(original)
    launch(call, regime)
    error = ((call["y"].float() - expected).norm() / expected.norm()).item()
    call["y"].copy_(original)
    assert error < FEATURE_EDIT.tolerances[torch.bfloat16], f"{regime} is wrong by {error:.1e}: nothing was measured"


def floor_bytes(call: dict[str, Any], *, grouped: bool) -> int:
    """Bytes that must move: tokens in and out, and rows once for each token, or once for each slot in use."""
    y, table = call["y"], call["table"]
    row = table.enc[0].nbytes + table.dec[0].nbytes
    times = call["slots"].unique().numel() if grouped else y.shape[0]
    return 2 * y.nbytes + times * row


def edit_case(tokens: int, width: int, rows: int, bandwidth: float, node_us: float) -> dict[str, Any]:
    first = make_call(tokens, width, rows)
    copies = min(12, max(2, int(200e6 // max(1, floor_bytes(first, grouped=True)))))
    calls = [first, *(make_call(tokens, width, rows) for _ in range(copies - 1))]
    for regime in Regime:
        checked(first, regime)
    for call in calls:
        call["table"].row_float[..., RowFloat.SCALE] = CALM
    regimes = [r for r in Regime if not (r is Regime.TWO_PHASE and tokens > 256)]
    times = {}
    for regime in regimes:
        times[regime.value] = graphed([lambda c=c, r=regime: launch(c, r) for c in calls])
    hook = None
    if floor_bytes(first, grouped=False) < 16e9:
        hook = graphed([lambda c=c: torch_hook(c) for c in calls])
    idle = [{**c, "slots": torch.zeros_like(c["slots"])} for c in calls]
    chosen = choose(tokens, rows, scratch=True, grouped=True, batch_invariant=False)
    return {
        "tokens": tokens,
        "width": width,
        "rows": rows,
        "regime": chosen.value,
        "us": times,
        "idle_us": graphed([lambda c=c: launch(c, Regime.ROW) for c in idle]),
        "torch_hook_us": hook,
        "floor_us": {
            "rows for each token": floor_bytes(first, grouped=False) / bandwidth * 1e6,
            "rows for each slot": floor_bytes(first, grouped=True) / bandwidth * 1e6,
            "a graph node": node_us,
        },
    }


def dense_case(tokens: int, width: int) -> dict[str, Any]:
    """Encode, decode, edit and decode again of a whole dictionary, as SAELens does it to keep the error term."""
    encoder = torch.randn(width, DICTIONARY, device=GPU, dtype=torch.bfloat16) / width**0.5
    decoder = torch.randn(DICTIONARY, width, device=GPU, dtype=torch.bfloat16) / width**0.5
    bias, threshold = (torch.zeros(DICTIONARY, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(tokens, width, device=GPU, dtype=torch.bfloat16)
    edited = torch.arange(8, device=GPU)

    def hook() -> None:
        pre = torch.addmm(bias, x, encoder)
        f = torch.where(pre > threshold, pre, 0)
        error = x - f @ decoder
        f[:, edited] *= CALM
        x.copy_(f @ decoder + error)

    return {"tokens": tokens, "width": width, "features": DICTIONARY, "us": graphed([hook])}


def rank_case(tokens: int, width: int, bandwidth: float) -> dict[str, Any]:
    """Ranks of active features, for which the whole dictionary must be read: nothing can be decided early."""
    call = make_call(tokens, width, 8)
    encoder = torch.randn(DICTIONARY, width, device=GPU) / width**0.5
    floats, ints = empty_rows((DICTIONARY,), GPU)
    ints[:, RowInt.ACT], ints[:, RowInt.TOPK] = int(Act.TOPK), DICTIONARY
    table = call["table"]
    table.row_int[..., RowInt.ACT], table.row_int[..., RowInt.TOPK] = int(Act.TOPK), DICTIONARY
    table.row_int[..., RowInt.FEATURE] = 0
    table.enc[:] = encoder[:8]
    buffers = RankBuffers.empty(tokens=tokens, rows=8, device=GPU)
    on = torch.tensor(True)

    def rank() -> None:
        topk_rank(call["y"], call["slots"], on, table, 0, encoder, floats, ints, buffers)

    provider = TOPK_RANK.provider(GPU)
    return {
        "tokens": tokens, "width": width, "features": DICTIONARY, "provider": provider, "us": graphed([rank]),
        "reading the encoder once us": encoder.nbytes / bandwidth * 1e6,
    }  # fmt: skip


def node_cost() -> float:
    """Microseconds of a graph node that stores one number."""
    ones = [torch.zeros(1, device=GPU) for _ in range(50)]
    return graphed([lambda t=t: t.zero_() for t in ones])


def hardware() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(GPU)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    parser.add_argument("--parts", nargs="+", default=["edit", "dense", "rank", "stack"], help="what to measure")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_ops.py needs a GPU, and there is none here. Nothing was measured.")
    torch.manual_seed(0)
    started = time.time()
    bandwidth, node_us = copy_bandwidth(GPU), node_cost()
    result: dict[str, Any] = {
        "what": "microseconds of a call inside a CUDA graph, median over replays",
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "copy_bandwidth_tb_s": bandwidth / 1e12,
        "graph_node_us": node_us,
    }
    sizes = [(t, d, k) for d in options.widths for k in ROWS for t in TOKENS]
    if "edit" in options.parts:
        result["edit"] = [edit_case(*size, bandwidth, node_us) for size in tqdm(sizes, desc="feature_edit")]
    if "dense" in options.parts:
        result["dense"] = [dense_case(t, d) for d in options.widths for t in tqdm(TOKENS, desc=f"dense {d}")]
    if "rank" in options.parts:
        result["rank"] = [rank_case(t, d, bandwidth) for d in options.widths for t in (1, 32)]
    if "stack" in options.parts:
        result["stack"] = [case for stack in STACKS for case in stack_times(stack, GPU, make_call, feature_edit)]
    result["seconds"] = round(time.time() - started)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{options.out}: {result['seconds']} s")


if __name__ == "__main__":
    main()
