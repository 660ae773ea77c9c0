"""``sae-steer convert``: from any checkpoint that is read to the layout that is read fastest."""

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from sae_steer_cli.refusal import refusals

CONVERT_HELP = """
Convert the SAE at SRC to the canonical layout: a new folder DST with one safetensors file.

In that layout a feature is one contiguous row in float32, with everything folded into it, so that a server opens a
dictionary of any size at once and reads only the features that requests use. What it computes does not change by a bit.

**Examples**

    sae-steer convert ./layer_12/params.npz ./layer-12
    sae-steer convert org/repo/layer_12@main ./layer-12
    sae-steer serve ./gemma --sae res12=./layer-12

Memory stays bounded whatever the size. DST appears when it is complete, and nothing that is there is overwritten.
"""


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a file, or org/repo[/folder][@revision].")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="The checkpoint family, where the files do not tell it.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """See ``CONVERT_HELP``."""
    with refusals():
        # Not before: torch takes a second, which --help need not wait for.
        from tqdm import tqdm

        from sae_steer.sae import open_sae
        from sae_steer.sae.convert import check_target
        from sae_steer.sae.convert import convert as write

        check_target(dst)
        # A compressed npz cannot be mapped: its arrays lie here until they are converted.
        with TemporaryDirectory(prefix=f".{dst.name}.", suffix=".tmp", dir=dst.parent) as unpacked:
            sae = open_sae(src, family, unpacked=Path(unpacked))
            # None: where the output is no terminal, there is no bar.
            disable = True if quiet else None
            with tqdm(total=sae.spec.n_features, unit=" features", unit_scale=True, disable=disable) as bar:
                file = write(sae, dst, bar.update)
        typer.echo(f"{file}: {sae.spec.n_features} features, {file.stat().st_size / 1e6:.1f} MB", err=True)
        typer.echo(f"sae-steer inspect {shlex.quote(str(dst))}", err=True)
