"""``sae-steer vllm-args``: from a configuration file of the vLLM plugin to the argument of ``vllm serve``."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_steer.errors import RequestError, StartError
from sae_steer_cli.refusal import imports_of, refusals

if TYPE_CHECKING:
    from sae_steer.catalog import Catalog
    from sae_steer_vllm.config import PluginConfig

VLLM_ARGS_HELP = """
Check a configuration FILE of the vLLM plugin, and print what `vllm serve` needs to use it.

**Examples**

A configuration, steer.json (`sae-steer vllm-args --schema` prints all that it may hold):

    {"saes": [{"name": "res12", "location": "./sae-layer-12"}], "profiles": "./profiles"}

Serve with it. VLLM_PLUGINS names the plugin, which vLLM's API server asks for:

    VLLM_PLUGINS=sae_steer vllm serve MODEL --additional-config "$(sae-steer vllm-args --json steer.json)"

The same as an argument quoted for a shell: to paste, for xargs, or for eval (a bare $(...) would keep the quotes):

    sae-steer vllm-args steer.json | VLLM_PLUGINS=sae_steer xargs vllm serve MODEL
    eval "VLLM_PLUGINS=sae_steer vllm serve MODEL $(sae-steer vllm-args steer.json)"

Without a file at the other end, for containers:

    sae-steer vllm-args --inline --json steer.json

The argument names FILE with the digest of its content, so print it again after every change: a server refuses to start
with a file that has changed. Paths inside FILE are taken from the folder in which vLLM runs.
"""


def vllm_args(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The configuration, as JSON.")] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="Print the configuration itself, instead of FILE and its digest.")
    ] = False,
    only_json: Annotated[
        bool, typer.Option("--json", help="Print the value of --additional-config alone, without shell quotes.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of FILE and exit.")] = False,
) -> None:
    """See ``VLLM_ARGS_HELP``."""
    with refusals():
        if schema:
            typer.echo(json.dumps(_schema(), indent=2))
            return
        if file is None:
            raise StartError("vllm-args: name the configuration FILE. `sae-steer vllm-args --help` shows one.")
        value = json.dumps(argument(file, inline=inline))
        typer.echo(value if only_json else f"--additional-config {shlex.quote(value)}")


def argument(file: Path, *, inline: bool) -> dict[str, Any]:
    """The value of ``--additional-config`` for a configuration file; raises :class:`StartError` over any mistake in it.

    Whether the SAEs and the calibrations fit the model is found out where the model is: at the start of vLLM.
    """
    with imports_of("vllm"):
        from sae_steer.catalog import ANY_MODEL
        from sae_steer_vllm.config import KEY, catalog_of, read_file
    config, digest = read_file(file)
    sources = [f"{sae.name} ({sae.location})" for sae in config.saes]
    sources += [f"{vector.name} ({vector.location})" for vector in config.vectors]
    _say(f"opening {', '.join(sources) or 'nothing: no SAE and no vector is named'}")
    catalog = catalog_of(config)
    _check(config, catalog.serving(ANY_MODEL))
    if inline:
        return {KEY: config.model_dump(mode="json", exclude_unset=True)}
    return {KEY: {"file": str(file.resolve()), "digest": digest}}


def _check(config: "PluginConfig", catalog: "Catalog") -> None:
    """Raises :class:`StartError` over sites and stored profiles that no server could use; tells what was found."""
    from sae_steer.capabilities import VLLM
    from sae_steer.compiler import compile_program
    from sae_steer.schema import parse_steering

    sites = catalog.sites(config.extra_sites())
    for name, entry in catalog.saes.items():
        spec = entry.sae.spec
        _say(f"{name}: {spec.architecture}, {spec.n_features} features of width {spec.d_in}, at {entry.site}")
    for name in catalog.profile_names():
        try:
            compile_program(
                parse_steering({"profiles": [name]}),
                catalog,
                VLLM,
                config.limits.limits(),
                sites=sites,
                bos_token_id=0,  # whether the model has one is not known here, and checked at the start
            )
        except RequestError as error:
            raise StartError(f"Profile {name!r} cannot be used: {error.message}") from None
    profiles = catalog.profile_names()
    if profiles:
        _say(f"profiles: {', '.join(profiles)}")


def _schema() -> dict[str, Any]:
    with imports_of("vllm"):
        from sae_steer_vllm.config import PluginConfig
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **PluginConfig.model_json_schema()}


def _say(text: str) -> None:
    typer.echo(f"sae-steer: {text}", err=True)
