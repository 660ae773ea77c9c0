"""What every implementation of ``lay_out`` must do; run on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_steer_kernels import LAY_OUT, BucketTokens, StepTokens
from tests.kernels.guards import Guards, poison

VOCABULARY = 11
NEVER = torch.iinfo(torch.int64).max
RESULTS = ("request", "absolute", "known", "bits", "wanted")

Call = tuple[StepTokens, list[BucketTokens]]


def generate(
    seed: int, *, tokens: int = 40, requests: int = 6, buckets: int = 2, reads: bool = True, narrow: bool = False
) -> Call:
    """A random step: some requests without tokens, some that nobody steers, tokens and starts beyond the last request.

    Args:
        seed: Of the generator.
        tokens: ``T``.
        requests: ``R``.
        buckets: In use.
        reads: Whether anything is read in the step.
        narrow: Whether positions and ids come as int32, as some runners have them.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, dtype=dtype)

    ends = draw(0, tokens + 1, requests).sort().values  # what is behind the last one is padding
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends, draw(tokens, tokens + 3, 2)]).int()
    wide = torch.int32 if narrow else torch.int64
    step = StepTokens(
        starts,
        draw(0, 20, tokens, dtype=wide),
        draw(-2, VOCABULARY + 3, tokens, dtype=torch.int32 if narrow else torch.int64),
        VOCABULARY,
        *(torch.zeros(tokens, dtype=torch.int64) for _ in range(3)),
        torch.zeros(tokens, dtype=torch.int32),
        torch.zeros(tokens, dtype=torch.bool) if reads else None,
    )
    bucket_of = draw(-1, buckets, requests)
    found = []
    for number in range(buckets):
        table, slots, pieces = requests + 3, 5, 4
        rows = torch.where(bucket_of == number, torch.randperm(requests, generator=rng) + 1, 0)
        begun = torch.where(draw(0, 3, table, pieces) == 2, NEVER, draw(1, 20, table, pieces))
        begun[:, 0], begun[0, 1:] = 0, NEVER
        masks, read, slot = (draw(0, 8, table, n, dtype=torch.int32) for n in (pieces, 1, 1))
        masks[0], read[0], slot[0] = 0, 0, 0
        by_token = draw(0, 8, slots, VOCABULARY, dtype=torch.int32)
        found.append(
            BucketTokens(
                torch.cat([rows, torch.zeros(1, dtype=torch.int64)]),
                slot[:, 0] % slots,
                draw(-1, 20, table),
                begun.sort(dim=1).values,
                masks,
                read[:, 0].contiguous(),
                by_token,
                torch.zeros(tokens, dtype=torch.int32),
                torch.zeros(tokens, dtype=torch.int64),
            )
        )
    return step, found


def _prepared(call: Call, device: torch.device, guards: Guards) -> Call:
    """The call on a device, with poison around all and inside the results."""

    def moved(part: Any, results: tuple[str, ...]) -> Any:
        values = {name: getattr(part, name) for name in part.__slots__}
        tensors = {name: guards.copy(t.to(device)) for name, t in values.items() if isinstance(t, Tensor)}
        for name in results:
            if name in tensors:
                poison(tensors[name])
        return replace(part, **tensors)

    step, buckets = call
    return moved(step, RESULTS), [moved(bucket, ("slots", "counted")) for bucket in buckets]


def _results(call: Call) -> dict[str, Any]:
    step, buckets = call
    found: dict[str, Any] = {name: getattr(step, name) for name in RESULTS}
    for number, bucket in enumerate(buckets):
        found |= {f"slots {number}": bucket.slots, f"counted {number}": bucket.counted}
        found[f"seen {number}"] = bucket.seen[1:]  # the first is nobody's, and holds anything
    return {name: None if value is None else value.tolist() for name, value in found.items()}


def run(call: Call, implementation: Callable[..., None], device: torch.device) -> dict[str, Any]:
    """The results by one implementation, as lists."""
    guards = Guards()
    here = _prepared(call, device, guards)
    implementation(*here)
    guards.check()
    return _results(here)


def expected(call: Call) -> dict[str, Any]:
    """What the definition says."""
    step, buckets = call
    mine = step, [replace(bucket, seen=bucket.seen.clone()) for bucket in buckets]
    LAY_OUT.reference(*mine)
    return _results(mine)


def check_random_steps(implementation: Callable[..., None], device: torch.device) -> None:
    seen: set[tuple[str, bool]] = set()
    for seed in range(60):
        call = generate(seed, reads=seed % 3 > 0, buckets=1 + seed % 2, narrow=seed % 5 == 0)
        want = expected(call)
        assert run(call, implementation, device) == want, f"seed {seed}"
        seen |= {(key, any(value)) for key, value in want.items() if value is not None}
    # Steps in which nothing held would be equal by any rule.
    assert {(key, True) for key in ("wanted", "bits", "slots 0", "slots 1", "counted 0", "counted 1")} <= seen


def check_sizes(implementation: Callable[..., None], device: torch.device) -> None:
    for tokens, requests in ((1, 1), (2, 5), (300, 3), (7, 40)):
        call = generate(tokens, tokens=tokens, requests=requests)
        assert run(call, implementation, device) == expected(call), f"{tokens} tokens of {requests} requests"
