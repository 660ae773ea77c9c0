"""``sae-steer selftest``: proves on a running server that steering does what it says, and nothing else."""

import json
import random
import sys
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sae_steer.errors import StartError
from sae_steer_cli.options import ApiKey
from sae_steer_cli.refusal import imports_of, refusals

if TYPE_CHECKING:
    from sae_steer_cli.checks.run import Outcome
    from sae_steer_cli.checks.subject import Edit, Subject

SELFTEST_HELP = """
Prove on a running server, with vLLM or without, that steering is applied, that plain answers are untouched, and that
the prefix cache leaks in neither direction.

**Examples**

A server of this machine; an edit that changes answers is looked for:

    sae-steer selftest --url http://127.0.0.1:8000

A server with a key, one of its models, and an edit that is known to do something:

    sae-steer selftest --url https://gpu:8000 --api-key KEY --model gemma --sae res12 --feature 4021 --value 80

For programs: every check with its verdict, as JSON; the status is 0 only if none failed:

    sae-steer selftest --url http://127.0.0.1:8000 --json

It sends about a hundred short requests, greedy ones, over the OpenAI-compatible API alone, and changes nothing on the
server. Texts are compared; log-probabilities too, within what plain answers of this server differ by themselves. On
vLLM each order of requests is compared with the same requests under a `cache_salt` of their own; start it with
`--enable-prompt-tokens-details`, and the tokens taken from the cache are compared as well. Behind a load balancer, name
one replica: each has a cache of its own.

**Status**: 0 = no check failed, 1 = one did, 2 = the server cannot be asked.
"""


def selftest(
    url: Annotated[str, typer.Option(metavar="URL", help="Where the server is, such as http://127.0.0.1:8000.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model to ask; default: the first that the server lists.")
    ] = None,
    api_key: ApiKey = None,
    sae: Annotated[
        str | None, typer.Option(metavar="NAME", help="The SAE to steer with; default: any that the server has.")
    ] = None,
    feature: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The feature to clamp; default: one is looked for.")
    ] = None,
    value: Annotated[
        float | None, typer.Option(metavar="V", help="What to clamp it to, in the SAE's own units; with --feature.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Makes the same prompts each time, for a server whose prefix cache is empty."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long one answer may take.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """See ``SELFTEST_HELP``."""
    with refusals():
        with imports_of("selftest"):
            from sae_steer_cli.checks.first import model_of
            from sae_steer_cli.checks.run import checks, run
            from sae_steer_cli.checks.subject import Subject
            from sae_steer_http.client import Server
        given = _given(sae, feature, value)
        with closing(Server(url, api_key or None, timeout)) as server:
            progress = _Progress()
            subject = Subject(server, model_of(server, model), progress.tell)
            if seed is not None:
                subject.chance = random.Random(seed)
            outcomes: list[Outcome] = []
            for outcome in run(subject, checks(given, sae)):
                progress.clear()
                outcomes.append(outcome)
                if not as_json:
                    typer.echo(f"{outcome.verdict}  {outcome.what}: {outcome.reason}")
    failed = any(outcome.verdict == "FAIL" for outcome in outcomes)
    if as_json:
        typer.echo(json.dumps(_report(subject, outcomes, passed=not failed), indent=2))
    else:
        typer.echo(_summary(outcomes))
    raise typer.Exit(1 if failed else 0)


def _given(sae: str | None, feature: int | None, value: float | None) -> "Edit | None":
    """The edit that the options name; raises :class:`StartError` for a part of one."""
    from sae_steer_cli.checks.subject import Edit

    if feature is None and value is None:
        return None
    if sae is None or feature is None or value is None:
        raise StartError("--feature and --value come together, and with --sae.")
    return Edit(sae, feature, value)


def _report(subject: "Subject", outcomes: "list[Outcome]", *, passed: bool) -> dict[str, object]:
    return {
        "passed": passed,
        "url": subject.server.url,
        "model": subject.model,
        "host": subject.host or None,
        "edit": asdict(subject.edit) if subject.edit is not None else None,
        "checks": [asdict(outcome) for outcome in outcomes],
    }


def _summary(outcomes: "list[Outcome]") -> str:
    count = Counter(outcome.verdict for outcome in outcomes)
    return f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped"


class _Progress:
    """What is being done, on stderr: one line that is written over on a terminal, and a line each in a log."""

    def __init__(self) -> None:
        self._over = sys.stderr.isatty()

    def tell(self, text: str) -> None:
        """Says what is being done now."""
        typer.echo(f"\r\x1b[K... {text}" if self._over else f"... {text}", err=True, nl=not self._over)

    def clear(self) -> None:
        """Makes room for a line of the result."""
        if self._over:
            typer.echo("\r\x1b[K", err=True, nl=False)
