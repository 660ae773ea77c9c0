"""A trace of one step under the load of a steered case."""

from collections.abc import Sequence
from pathlib import Path

import httpx

from sae_steer_bench.cases import Case
from sae_steer_bench.connect import Servers
from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.load import Generator, Work
from sae_steer_bench.records import Plan
from sae_steer_http import ADMIN_HEADER

_STEPS = 24
"""Completion tokens at least: a server lets the first steps by, and traces one of those after them."""


def trace(folder: Path, plan: Plan, servers: Servers, generator: Generator, cases: Sequence[Case]) -> str:
    """Traces one step of the first steered case; returns where the traces are.

    Raises:
        LoadFailed: The server takes no trace, or took none.
    """
    case = next(case for case in cases if case.programs)
    before = set(folder.rglob("*")) if folder.is_dir() else set()
    work = Work(
        bodies=case.bodies,
        requests=plan.loads[0].concurrency,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=max(plan.output_tokens, _STEPS),
        vocabulary=plan.server.vocabulary,
        seed=f"{plan.seed} {plan.started} profile",
    )
    with _client(servers) as client:
        _post(client, "/start_profile")
        try:
            generator.run(servers.steered, work, plan.loads[0].model_copy(update={"rate": None}))
        finally:
            _post(client, "/stop_profile")
    if not servers.launched:
        return f"a trace of one step of {case.label!r} into the folder that {servers.steered.url} was started with"
    new = sorted(str(path) for path in folder.rglob("*") if path.is_file() and path not in before)
    if not new:
        raise LoadFailed(f"The server took no trace: nothing new is in {folder}.")
    return f"a trace of one step of {case.label!r}: {', '.join(new)}"


def _client(servers: Servers) -> httpx.Client:
    headers = {ADMIN_HEADER: servers.admin_key or ""}
    if servers.api_key:
        headers["Authorization"] = f"Bearer {servers.api_key}"
    return httpx.Client(base_url=servers.steered.url, headers=headers, timeout=servers.timeout)


def _post(client: httpx.Client, path: str) -> None:
    try:
        reply = client.post(path)
    except httpx.HTTPError as error:
        raise LoadFailed(f"{client.base_url}{path}: {error}") from error
    if reply.status_code in (404, 405):
        raise LoadFailed(
            f"The server has no {path}. Start vLLM with --profiler-config, and sae-steer serve with --profile-dir and "
            "--admin-key; --launch does it by itself."
        )
    if not reply.is_success:
        raise LoadFailed(f"{path} is answered with HTTP {reply.status_code}: {reply.text}")
