"""``sae-steer bench``: what steering costs a server, measured so that anyone can check it."""

import math
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sae_steer.errors import StartError, SteerError
from sae_steer_cli.options import ApiKey
from sae_steer_cli.refusal import imports_of, refusals

if TYPE_CHECKING:
    from sae_steer_bench.options import Options

BENCH_HELP = """
Measure what steering costs a server: latency and throughput, steered and not, in interleaved rounds.
"""
SERVE_HELP = """
Measure a server over HTTP, and write a report: one HTML file, `result.json`, plots.

**Examples**

The embedded server, which is started for it, with and without its SAE, in under five minutes:

    sae-steer bench serve --quick

A vLLM server, started twice: with the plugin, and without it. On a GPU each may take half of it, which is to be said:

    sae-steer bench serve --launch "vllm serve MODEL --gpu-memory-utilization 0.45 --additional-config '...'"

A server that runs already; what it costs is compared with requests that it does not steer:

    sae-steer bench serve --url http://127.0.0.1:8000

A run that was stopped goes on where it was:

    sae-steer bench serve --resume sae-steer-bench-...

Each round measures every case once, in a new order; shown are medians of the ratios within a round, with 95 %
intervals. What the server refuses is reported with its own words. The load is a closed loop of `--concurrency`
requests, and with `--rate` also requests that arrive at that rate. Where vLLM is installed and serves, `vllm bench
serve` sends them, unless the launched server stores no profiles, which that needs; elsewhere the `openai` client does,
by the same definitions.

**Status**: 0 = measured, 1 = the server stopped answering (complete rounds are kept), 2 = it could not be begun, or its
report not be written.
"""
REPORT_HELP = """
Write the report of a run again, from what it measured; also of one that was killed.

    sae-steer bench report sae-steer-bench-...
"""
COMPARE_HELP = """
Hold two runs against each other: does each median lie where the other run expects it?

From a run's own rounds follows, with 99 %, between which ratios the median of another such run lies. Two runs of one
thing agree in all or nearly all of them; what differs by more has changed, or was measured beside other work.

    sae-steer bench compare RUN RUN

**Status**: 0 = all do, 1 = some do not.
"""

bench = typer.Typer(no_args_is_help=True, help=BENCH_HELP)


@bench.command(help=SERVE_HELP)
def serve(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A server that runs, with the plugin.")] = None,
    launch: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Start this server, with the plugin and without; default: the demo's."),
    ] = None,
    plain_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The same server without the plugin, where one runs.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the first that the server lists.")] = None,
    api_key: ApiKey = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="SAE_STEER_ADMIN_KEY", help="The server's admin key, for --profile and profiles."
        ),
    ] = None,
    generator: Annotated[
        Literal["openai", "vllm"] | None,
        typer.Option(help="Who sends requests; default: vllm for vLLM where that is installed here, else openai."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="For the generator vllm; default: the served model's own.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Measure at this many requests a second too; 0 = half of the closed loop's. Repeatable.",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a completion; none ends earlier.")] = 32,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of one measurement; default: as there is time for.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=5, help="Most rounds.")] = 100,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="After which no further round is begun, once five are done; default: 5, and 2 with --quick."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the cases that tell most.")] = False,
    case: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Only this case, and its baselines. Repeatable.")
    ] = None,
    value: Annotated[float, typer.Option(help="What features are clamped to, in the SAE's own units.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order, the prompts and the intervals.")] = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="In the end, let the server write a PyTorch profiler trace of one step.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; default: sae-steer-bench-TIME here.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the run in this folder.")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long an answer may take.")] = 600.0,
    start_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="How long a launched server may take to start.")
    ] = 900.0,
) -> None:
    """See ``SERVE_HELP``."""
    with refusals():
        with imports_of("bench"):
            from sae_steer_bench.options import Options
        _check(context)
        folder = resume or out or Path(f"sae-steer-bench-{datetime.now():%Y%m%d-%H%M%S}")
        options = Options(
            command=_command(),
            folder=folder,
            url=url,
            launch=launch,
            plain_url=plain_url,
            model=model,
            api_key=api_key or None,
            admin_key=admin_key or None,
            generator=generator,
            tokenizer=tokenizer,
            concurrency=concurrency,
            rates=tuple(rate or ()),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            requests=requests,
            rounds=rounds,
            minutes=minutes if minutes is not None else 2.0 if quick else 5.0,
            quick=quick,
            cases=tuple(case or ()),
            value=value,
            seed=seed,
            profile=profile,
            timeout=timeout,
            start_timeout=start_timeout,
        )
        _measure(options, resume=resume is not None)


_WITH_RESUME = frozenset({"resume", "api_key", "admin_key", "profile", "timeout", "start_timeout"})
"""Options that do not change what a run measures."""


def _check(context: typer.Context) -> None:
    """Raises :class:`StartError` for options that do not go together, or that are no values."""
    given: dict[str, Any] = {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    options = {name: f"--{name.replace('_', '-')}" for name in given}
    if "url" in given and "launch" in given:
        raise StartError("--url names a server that runs, and --launch one that is started: give one of them.")
    others = [options[name] for name in given if name not in _WITH_RESUME]
    if "resume" in given and others:
        raise StartError(f"--resume goes on with the run as it was begun, and takes no {', '.join(others)}.")
    for name, value in given.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise StartError(f"{options[name]}: write a number.")
        if name in ("url", "plain_url") and "@" in value:
            raise StartError(f"{options[name]}: an address is written into the report, so it may hold no password.")


def _command() -> str:
    """The command line, without keys."""
    words = [Path(sys.argv[0]).name.replace("__main__.py", "sae-steer"), *sys.argv[1:]]
    for place, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name in ("--api-key", "--admin-key"):
            if equals:
                words[place] = f"{name}=..."
            elif place + 1 < len(words):
                words[place + 1] = "..."
    return shlex.join(words)


def _measure(options: "Options", *, resume: bool) -> None:
    """Measures, and writes what was measured, however it ended."""
    with imports_of("bench"):
        from rich.console import Console

        from sae_steer_bench.errors import words_of
        from sae_steer_bench.options import Watch
        from sae_steer_bench.report import write
        from sae_steer_bench.result import result_of
        from sae_steer_bench.run import Run
        from sae_steer_bench.table import Display, tables
    console = Console(stderr=True)
    stopped: str | None = None
    with Display(console) as display:
        run = Run(options, Watch(display.say, display.step, display.plan, display.rounds))
        try:
            run.measure(resume=resume)
        except KeyboardInterrupt:
            if run.plan is None:
                raise
            stopped = "interrupted."
        except (SteerError, OSError) as error:  # the second: there is no room for what is written, or no leave
            stopped = error.message if isinstance(error, SteerError) else f"{words_of(error)}."
            if run.plan is None:
                raise StartError(stopped) from error
    if run.plan is not None and run.done:
        result = result_of(run.plan, run.done, stopped=stopped)
        page = write(result, options.folder)
        Console(width=None if sys.stdout.isatty() else 200).print(tables(result))
        typer.echo(f"The report: {page}", err=True)
    if stopped is not None:
        typer.echo(f"sae-steer: {stopped}", err=True)
        typer.echo(f"Go on with: sae-steer bench serve --resume {shlex.quote(os.fspath(options.folder))}", err=True)
        raise typer.Exit(1)


@bench.command(help=REPORT_HELP)
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")]) -> None:
    """See ``REPORT_HELP``."""
    with refusals():
        with imports_of("bench"):
            from rich.console import Console

            from sae_steer_bench.report import load, write
            from sae_steer_bench.table import tables
        result = load(folder)
        if not folder.is_dir():
            raise StartError(f"{folder} is a file: a report is written into the folder of a run. Name that.")
        page = write(result, folder)
        Console(width=None if sys.stdout.isatty() else 200).print(tables(result))
        typer.echo(f"The report: {page}", err=True)


@bench.command(help=COMPARE_HELP)
def compare(
    one: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its result.json.")],
    other: Annotated[Path, typer.Argument(metavar="RUN", help="Another.")],
) -> None:
    """See ``COMPARE_HELP``."""
    with refusals():
        with imports_of("bench"):
            from sae_steer_bench.report import load
            from sae_steer_bench.result import compare as hold
            from sae_steer_bench.result import differences
            from sae_steer_bench.table import again_text
        first_run, second_run = load(one), load(other)
        rows = hold(first_run, second_run, "tpot_ms")
        if not rows:
            raise StartError("The runs have no case in common.")
        for difference in differences(first_run, second_run):
            typer.echo(f"sae-steer: the runs are not of one thing: {difference}", err=True)
        for load_name, label, baseline, first, second, same in rows:
            verdict = "agree" if same else "DIFFER"
            texts = [f"{r.median:.3f} (again: {again_text(r)})" for r in (first, second)]
            typer.echo(f"{verdict}  {label}, {load_name}, TPOT / {baseline}: {texts[0]} and {texts[1]}")
        typer.echo(f"{sum(row[-1] for row in rows)} of {len(rows)} agree.")
    raise typer.Exit(0 if all(row[-1] for row in rows) else 1)
