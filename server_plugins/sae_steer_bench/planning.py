"""What a run will measure: cases that the server takes, loads, and as many requests as there is time for."""

import random
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from sae_steer_bench.cases import QUICK, Case, Cases
from sae_steer_bench.connect import Servers, Source
from sae_steer_bench.errors import BenchError
from sae_steer_bench.load import Generator, Work
from sae_steer_bench.load_vllm import VllmLoad
from sae_steer_bench.machine import machine, versions
from sae_steer_bench.options import Options
from sae_steer_bench.records import LoadPlan, Plan, ServerFacts
from sae_steer_bench.rounds import LEAST_ROUNDS, now
from sae_steer_bench.samples import Batch
from sae_steer_bench.target import refusal

_WAVES = 8
"""Most times that a measurement fills the server's batch, unless it would be too short for that."""
_LEAST_SECONDS = 1.0
"""Of a measurement: where the client waits for its core once, a shorter one shows that and not the server."""
_AIM_ROUNDS = 10
"""Rounds that the minutes are spread over."""
_RATE_SHARE = 0.5
"""Of what the closed loop reached: well below it no queue grows, and what is timed is the server."""


def make_plan(options: Options, source: Source, servers: Servers, generator: Generator) -> tuple[Plan, list[Case]]:
    """Decides what is measured, and returns it with the cases that are.

    Raises:
        BenchError: The options do not fit the server, or leave nothing to measure.
        LoadFailed: It does not answer a first load.
    """
    facts = servers.facts
    _check(options, facts)
    cases = _chosen(options, Cases(facts, options.concurrency, options.value).all(plain=servers.plain is not None))
    refused = _refused(options, servers, generator, cases)
    plans = [case.plan(refused.get(case.key)) for case in cases]
    measured = [case for case, plan in zip(cases, plans, strict=True) if plan.status == "measured"]
    if not any(case.programs for case in measured):
        told = "; ".join(f"{plan.label}: {plan.reason}" for plan in plans if plan.reason)
        raise BenchError(f"No steered case can be measured here. {told}")
    first = _first_load(options, servers, generator)
    loads = _loads(options, first)
    plan = Plan(
        command=options.command,
        started=now(),
        launch=source.launch,
        url=source.url,
        plain_url=source.plain_url,
        server=facts,
        generator="vllm" if isinstance(generator, VllmLoad) else "openai",
        tokenizer=options.tokenizer,
        loads=loads,
        cases=plans,
        value=options.value,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        requests=options.requests or _requests(options, first, loads, len(measured)),
        rounds=options.rounds,
        minutes=options.minutes,
        seed=options.seed,
        machine=machine(),
        versions=versions(),
    )
    return plan, measured


def require_same_place(plan: Plan) -> None:
    """Raises :class:`BenchError` where a resumed plan was begun on another machine, or with other packages.

    Rounds of both would be one median, and say nothing of either.
    """
    then, today = plan.machine.model_dump(), machine().model_dump()
    for before, after, what in ((then, today, "machine"), (plan.versions, versions(), "versions")):
        for name in before | after:
            if before.get(name) != after.get(name):
                raise BenchError(
                    f"The run was begun with another {name} ({what}): it was {before.get(name)}, and is "
                    f"{after.get(name)}. Begin a new run."
                )


def cases_again(plan: Plan, servers: Servers) -> list[Case]:
    """The measured cases of a plan that is resumed; raises :class:`BenchError` where the server is another one."""
    now_there = servers.facts
    for what in ("host", "version", "model", "saes", "limits", "vocabulary"):
        before, after = getattr(plan.server, what), getattr(now_there, what)
        if before != after:
            raise BenchError(
                f"The run was begun on another server: its {what} was {before}, and is {after}. Begin a new run."
            )
    wanted = {case.key for case in plan.cases if case.status == "measured"}
    every = Cases(plan.server, plan.loads[0].concurrency, plan.value).all(plain=servers.plain is not None)
    return [replace(case, obstacle=None) for case in every if case.key in wanted]


def _check(options: Options, facts: ServerFacts) -> None:
    if options.requests is not None and options.requests < options.concurrency:
        raise BenchError(
            f"--requests {options.requests} would never fill --concurrency {options.concurrency}. Raise the first, or "
            "lower the second."
        )
    most = facts.limits.get("max_choices")
    if most is not None and options.concurrency > most:
        raise BenchError(
            f"The server takes {most:g} requests at once (--max-concurrent), and --concurrency is "
            f"{options.concurrency}. Lower the second, or raise the first."
        )
    context = facts.limits.get("max_model_len")
    tokens = options.prompt_tokens + options.output_tokens
    if context is not None and tokens > context:
        raise BenchError(
            f"The server's context is {context:g} tokens; --prompt-tokens and --output-tokens make {tokens}."
        )


def _chosen(options: Options, cases: Sequence[Case]) -> list[Case]:
    keys = {case.key for case in cases}
    unknown = [key for key in options.cases if key not in keys]
    if unknown:
        raise BenchError(f"--case {unknown[0]!r} is not a case. Cases: {', '.join(case.key for case in cases)}.")
    wanted = {*options.cases, "plain", "idle"} if options.cases else QUICK if options.quick else keys
    return [case for case in cases if case.key in wanted]


def _refused(options: Options, servers: Servers, generator: Generator, cases: Sequence[Case]) -> dict[str, str]:
    """What the server says to cases that it refuses, and the generator to those that it cannot send."""
    chance = random.Random(options.seed)
    prompt = [chance.randrange(16, servers.facts.vocabulary) for _ in range(options.prompt_tokens)]
    found: dict[str, str] = {}
    with servers.client() as client:
        for case in cases:
            if case.obstacle is None and not case.plain:
                # Of two reasons the server's own comes first: a program that it refuses is no profile either.
                said = refusal(client, servers.facts.model, case, prompt)
                said = said or generator.obstacle(servers.steered, case.bodies)
                if said is not None:
                    found[case.key] = said
    return found


def _first_load(options: Options, servers: Servers, generator: Generator) -> Batch:
    """One full batch of plain requests, timed once the server has seen one before."""
    load = LoadPlan(name="first", concurrency=options.concurrency)

    def send(number: int) -> Batch:
        work = Work(
            bodies=(None,),
            requests=options.concurrency,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            vocabulary=servers.facts.vocabulary,
            seed=f"{options.seed} {now()} first {number}",
        )
        return generator.run(servers.steered, work, load)

    send(0)
    return send(1)


def _loads(options: Options, first: Batch) -> list[LoadPlan]:
    """The closed loop, and one load for each rate; "half rate" has a name that two runs share, as its rate is not."""
    half = float(f"{_RATE_SHARE * len(first.samples) / first.seconds:.3g}")
    rates = {f"rate {rate:g}/s" if rate else "half rate": rate or half for rate in options.rates}
    closed = LoadPlan(name="closed", concurrency=options.concurrency)
    return [closed, *(LoadPlan(name=name, concurrency=options.concurrency, rate=rate) for name, rate in rates.items())]


def _requests(options: Options, first: Batch, loads: Sequence[LoadPlan], cases: int) -> int:
    """Requests of a measurement: as many full batches as fit where the minutes are spread over some rounds."""
    least = ceil(_LEAST_SECONDS / first.seconds)
    rounds = max(LEAST_ROUNDS, min(_AIM_ROUNDS, options.rounds))
    # One full batch under each load; at a rate, its requests come no faster than that.
    batches = sum(first.seconds if each.rate is None else options.concurrency / each.rate for each in loads)
    fit = int(60 * options.minutes / (rounds * cases * batches))
    return options.concurrency * max(least, min(_WAVES, fit))
