"""``sae-steer find``: which features tell one kind of text from another."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae_steer_cli.options import (
    BatchTokens,
    Device,
    ElementType,
    MaxLength,
    Model,
    OneSae,
    OnlyRows,
    Quiet,
    TextColumn,
)
from sae_steer_cli.refusal import imports_of, refusals

if TYPE_CHECKING:
    from sae_steer.calibration.find import Found

FIND_HELP = """
Find the features of an SAE that fire on POSITIVE text and not on NEGATIVE text.

Features are ranked by how well they tell the two apart. For the best, the command also ablates each alone and says how
much worse the model then predicts the positive text, and shows where they fire, with the token marked.

**Examples**

    sae-steer find --model demo --positive sea.txt --negative other.txt
    sae-steer find --model ./model --sae ./sae@resid_post.12 --positive a.jsonl --negative b.jsonl --top 20 --json

Files have one text a line (.txt), or are .jsonl, .csv or .tsv with a column `text`. About 50 texts of each are enough
to see the strongest features. What is found can be tried at once: `{"op": "ablate", "features": [N]}`.
"""


def find(
    model: Model,
    positive: Annotated[Path, typer.Option(metavar="FILE", help="Text that has what is sought.")],
    negative: Annotated[Path, typer.Option(metavar="FILE", help="Text that is alike but for that.")],
    sae: OneSae = None,
    text_column: TextColumn = "text",
    only: OnlyRows = None,
    tokens: Annotated[
        Literal["last", "all"], typer.Option(help="Which tokens of a text are compared: each, or its last.")
    ] = "all",
    top: Annotated[int, typer.Option(min=1, max=1000, help="Features to show.")] = 10,
    by: Annotated[
        Literal["separability", "dprime", "rate", "effect"],
        typer.Option(
            help="Rank by Jensen-Shannon distance, d', difference of the firing rates, or effect on the loss."
        ),
    ] = "separability",
    effect_texts: Annotated[
        int, typer.Option(min=0, help="Positive texts on which each feature is ablated; 0 = no effects.")
    ] = 100,
    example_texts: Annotated[
        int, typer.Option(min=0, help="Texts of each file that are searched for examples.")
    ] = 1000,
    examples: Annotated[int, typer.Option(min=0, max=100, help="Examples of each feature.")] = 3,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 4096,
    dtype: ElementType = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """See ``FIND_HELP``."""
    with refusals(), imports_of("calibrate"):
        # Not before: torch takes a second, which --help need not wait for.
        from sae_steer_cli.finding import Search, search

        if by == "effect" and not effect_texts:
            from sae_steer.errors import DataError

            raise DataError("--by effect needs effects: leave --effect-texts above 0.")
        found = search(
            Search(
                model=model,
                sae=sae,
                files=(negative, positive),
                text_column=text_column,
                only=tuple(only or ()),
                tokens=tokens,
                top=top,
                by=by,
                effect_texts=effect_texts,
                example_texts=example_texts if examples else 0,
                examples=examples,
                max_length=max_length,
                batch_tokens=batch_tokens,
                dtype=dtype,
                device=device,
                quiet=quiet,
            )
        )
        typer.echo(json.dumps(_json(found), indent=1) if as_json else _text(found))


def _json(found: "list[Found]") -> dict[str, object]:
    return {
        "features": [
            {**asdict(f.candidate), "effect": f.effect, "label": f.name, "examples": [asdict(e) for e in f.examples]}
            for f in found
        ]
    }


def _text(found: "list[Found]") -> str:
    lines = [f"{'feature':>9}{'distance':>10}{'d-prime':>10}{'AUROC':>8}{'fires':>8}{'else':>8}{'effect':>10}  label"]
    for f in found:
        c = f.candidate
        effect = f"{f.effect:+.4f}" if f.effect is not None else ""
        lines.append(
            f"{c.feature:>9}{c.distance:>10.3f}{c.dprime:>10.2f}{c.auroc:>8.3f}{c.rate:>8.1%}{c.rate_rest:>8.1%}"
            f"{effect:>10}  {f.name or ''}"
        )
        for e in f.examples:
            marked = f"{e.before}[[{e.token}]]{e.after}".replace("\n", " ")
            lines.append(f"{e.value:>19.2f}  {e.label}, line {e.line}: {marked}")
    lines += [
        "",
        "distance: Jensen-Shannon, 0 to 1. fires, else: share of observations on which it fires, in positive and in",
        "negative text. effect: change of the loss on positive text where the feature is ablated, nats a token.",
    ]
    return "\n".join(lines)
