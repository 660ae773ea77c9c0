"""The commands of ``sae-steer``; each has its own file and imports what it needs when it runs."""

import json
from typing import Annotated

import typer

import sae_steer
from sae_steer.schema import steering_json_schema
from sae_steer_cli.bench import bench
from sae_steer_cli.calibrate import CALIBRATE_HELP, calibrate
from sae_steer_cli.convert import CONVERT_HELP, convert
from sae_steer_cli.evaluate import evaluate
from sae_steer_cli.find import FIND_HELP, find
from sae_steer_cli.inspect_sae import INSPECT_HELP, inspect
from sae_steer_cli.selftest import SELFTEST_HELP, selftest
from sae_steer_cli.separability import SEPARABILITY_HELP, separability
from sae_steer_cli.serve import SERVE_HELP, serve
from sae_steer_cli.sweep import SWEEP_HELP, sweep
from sae_steer_cli.vllm_args import VLLM_ARGS_HELP, vllm_args

app = typer.Typer(
    name="sae-steer",
    help="Serves language models whose features every request may edit, through sparse autoencoders (SAEs).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the command itself."""
    if version:
        print(sae_steer.__version__)
        raise typer.Exit


app.command(help=SERVE_HELP)(serve)
app.command("vllm-args", help=VLLM_ARGS_HELP)(vllm_args)
app.command(help=SELFTEST_HELP)(selftest)
app.command(help=INSPECT_HELP)(inspect)
app.command(help=CONVERT_HELP)(convert)
app.add_typer(evaluate, name="evaluate")
app.command(help=CALIBRATE_HELP)(calibrate)
app.command(help=FIND_HELP)(find)
app.command(help=SEPARABILITY_HELP)(separability)
app.command(help=SWEEP_HELP)(sweep)
app.add_typer(bench, name="bench")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the request field `steering`."""
    print(json.dumps(steering_json_schema(), indent=2))


def main() -> None:
    """Entry point of the command."""
    app()
