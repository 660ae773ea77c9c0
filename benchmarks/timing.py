"""Times of calls inside a CUDA graph."""

import statistics
from collections.abc import Callable, Sequence

import torch

ROUNDS = 15


def graphed(calls: Sequence[Callable[[], object]], *, least_us: float = 3000.0) -> float:
    """Microseconds of a call: the median over rounds of replays of a graph that holds every call once.

    Args:
        calls: What to capture, in order; each must be free of synchronisation.
        least_us: How long a round lasts at least.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, and lets libraries choose
            call()
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replays = max(1, int(least_us / max(1.0, _replays_us(graph, 3) / 3)))
    _replays_us(graph, replays)
    return statistics.median(_replays_us(graph, replays) / replays / len(calls) for _ in range(ROUNDS))


def _replays_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graphed([lambda: target.copy_(source)]) * 1e6
