"""Options that several commands have, so that one name means one thing in all of them; defaults are the commands'."""

from pathlib import Path
from typing import Annotated

import typer

from sae_steer_server.settings import DType

Model = Annotated[str, typer.Option(metavar="MODEL", help="A folder, a hub id, or `demo`: the embedded model.")]
ElementType = Annotated[DType, typer.Option(help="Element type of the model; auto = the one its files state.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N; auto = a GPU where there is one.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens that the model runs at once.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a text that are run; default: the model's context.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]

_SAE = "[NAME=]LOCATION[@SITE]"
OneSae = Annotated[
    str | None,
    typer.Option(
        metavar=_SAE,
        help="The SAE: a folder or org/repo[/folder][#revision]. NAME is what the server calls it (`sae`).",
    ),
]
Saes = Annotated[list[str] | None, typer.Option(metavar=_SAE, help="An SAE. Repeatable.")]

LabelledText = Annotated[Path, typer.Option(metavar="FILE", help="Labelled text: .jsonl, .csv or .tsv, in UTF-8.")]
TextColumn = Annotated[str, typer.Option(metavar="COLUMN", help="Where a row's text is.")]
LabelColumn = Annotated[str, typer.Option(metavar="COLUMN", help="Where its label is.")]
LabelSeparator = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What separates several labels of a row; JSON may hold a list.")
]
LabelNames = Annotated[
    list[str] | None,
    typer.Option(metavar="VALUE=LABEL", help="Call a label otherwise; several may become one. Repeatable."),
]
OnlyRows = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Use only rows that have this. Repeatable.")
]
SpanColumns = Annotated[
    str | None, typer.Option(metavar="START,END", help="Columns of the labelled span: characters, half-open.")
]
SkipUnlabelled = Annotated[bool, typer.Option("--skip-unlabelled", help="Leave rows without a label out, counted.")]

ApiKey = Annotated[str | None, typer.Option(metavar="KEY", envvar="SAE_STEER_API_KEY", help="The server's Bearer key.")]
