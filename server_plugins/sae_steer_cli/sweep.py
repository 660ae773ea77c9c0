"""``sae-steer sweep``: which strength, at which layer."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sae_steer_cli.options import BatchTokens, Device, ElementType, Model, Quiet, Saes, TextColumn
from sae_steer_cli.refusal import imports_of, refusals

SWEEP_HELP = """
Try every strength at every place: what it does to a target, what it costs on plain text, and where more is too much.

What is swept is one of: a feature (`--feature`), a vector (`--vector`), or a calibrated concept (`--profile`).

**Examples**

A feature at its own SAE's place; the target is how likely text of the sea is:

    sae-steer sweep --model demo --feature 551 --strengths 1,2,4,8 --target sea.txt --plain plain.txt --out sweep

The same feature's direction, added at several layers in multiples of the token's length:

    sae-steer sweep --model demo --feature 551 --site resid_post.1 --site resid_post.3 --units residual_norm
      --strengths 0.1,0.2,0.4 --phrase " the sea" --prompt "She went to" --plain plain.txt --out sweep

A concept of calibrations made at several layers; strength is the exponent of the gain:

    sae-steer sweep --model ./model --sae l3=./sae3 --sae l6=./sae6 --profile profiles/toxic3 --profile profiles/toxic6
      --concept toxic --strengths 0.5,1,2,4 --target toxic.txt --plain plain.txt --out sweep

**Effect**: change of the mean log-probability of the target's tokens, nats a token. The target is all of a file of
texts (`--target`), or phrases behind prompts (`--phrase`, `--prompt`). **Cost**: rise of the loss on `--plain` text,
same unit. **Knee**: the strength whose point (cost, effect), as shares of the largest at its place, is farthest above
the chord from (0, 0) to (1, 1).

DIR gets sweep.json and sweep.png. A sweep that is killed goes on when the same command is given again.
"""


def sweep(
    model: Model,
    plain: Annotated[Path, typer.Option(metavar="FILE", help="Text on which perplexity and dose are measured.")],
    strengths: Annotated[str, typer.Option(metavar="A,B,…", help="The strengths to try.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the results.")],
    sae: Saes = None,
    feature: Annotated[int | None, typer.Option(min=0, help="Sweep this feature of the SAE.")] = None,
    vector: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Sweep this direction, added at each --site.")
    ] = None,
    profile: Annotated[
        list[Path] | None, typer.Option(metavar="DIR/NAME", help="Sweep `app` from this calibration. Repeatable.")
    ] = None,
    concept: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The concept of --profile; its first if not given.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="Where a vector, or a feature's decoder row, is added. Repeatable."),
    ] = None,
    op: Annotated[
        Literal["add", "clamp", "scale"], typer.Option(help="What is done to a feature at its own place.")
    ] = "add",
    units: Annotated[
        Literal["raw", "reference_max", "residual_norm"], typer.Option(help="Of the strengths of add and clamp.")
    ] = "raw",
    target: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts whose likelihood is the target.")] = None,
    phrase: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A phrase whose likelihood is the target. Repeatable.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What stands before the phrases. Repeatable.")
    ] = None,
    text_column: TextColumn = "text",
    texts: Annotated[int, typer.Option(min=1, help="Most texts of each file.")] = 200,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text that are run; default: the model's context.")
    ] = None,
    batch_tokens: BatchTokens = 4096,
    dtype: ElementType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """See ``SWEEP_HELP``."""
    with refusals(), imports_of("calibrate"):
        # Not before: torch takes a second, which --help need not wait for.
        from sae_steer_cli.sweeping import Sweep, run

        run(
            Sweep(
                model=model,
                saes=tuple(sae or ()),
                feature=feature,
                vector=vector,
                profiles=tuple(profile or ()),
                concept=concept,
                sites=tuple(site or ()),
                op=op,
                units=units,
                strengths=strengths,
                target=target,
                phrases=tuple(phrase or ()),
                prompts=tuple(prompt or ()),
                plain=plain,
                text_column=text_column,
                texts=texts,
                max_length=max_length,
                batch_tokens=batch_tokens,
                dtype=dtype,
                device=device,
                out=out,
                quiet=quiet,
            )
        )
