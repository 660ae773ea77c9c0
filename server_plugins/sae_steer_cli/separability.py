"""``sae-steer separability``: how well features tell concepts apart, by layer, beside the model's coordinates."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sae_steer_cli.options import (
    BatchTokens,
    Device,
    ElementType,
    LabelColumn,
    LabelledText,
    LabelNames,
    LabelSeparator,
    MaxLength,
    Model,
    OnlyRows,
    Quiet,
    Saes,
    SkipUnlabelled,
    SpanColumns,
    TextColumn,
)
from sae_steer_cli.refusal import imports_of, refusals, writes

SEPARABILITY_HELP = """
Score how well the features of SAEs tell the labels of a text apart, beside the model's own coordinates at those places.

The score of a feature is the mean Jensen-Shannon distance between its activation's distributions given each pair of
labels: 0 = it says nothing, 1 = it never overlaps. Several SAEs, at one layer or many, take one pass of the text.

**Examples**

    sae-steer separability --model demo --data topics.jsonl --out report
    sae-steer separability --model ./model --sae l3=./sae3 --sae l6=./sae6 --data train.csv --concept toxic --out report

DIR gets report.html, which needs no other file, the plots as PNG, and separability.json with the score of every
feature. """


def separability(
    model: Model,
    data: LabelledText,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the report.")],
    sae: Saes = None,
    concept: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="A label whose best features are shown. All: none named.")
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    label_separator: LabelSeparator = None,
    label_name: LabelNames = None,
    only: OnlyRows = None,
    span_columns: SpanColumns = None,
    skip_unlabelled: SkipUnlabelled = False,
    tokens: Annotated[
        Literal["last", "all", "labelled-span"], typer.Option(help="Which tokens of a text are observations.")
    ] = "last",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 4096,
    dtype: ElementType = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """See ``SEPARABILITY_HELP``."""
    with refusals(), imports_of("calibrate"):
        # Not before: torch takes a second, which --help need not wait for.
        from tqdm import tqdm

        from sae_steer.calibration.data import Reader, survey
        from sae_steer.calibration.encode import Encoder
        from sae_steer.calibration.harvest import Progress, check_width, context_of, windows
        from sae_steer.calibration.info import CalibrationSettings
        from sae_steer.calibration.observe import Observing, Tokeniser
        from sae_steer.calibration.report import About, table, write_report
        from sae_steer.calibration.separate import Dictionary, Separation
        from sae_steer.errors import DataError
        from sae_steer_cli.models import columns_of, load_model, load_sae

        columns = columns_of(
            text=text_column, label=label_column, separator=label_separator, names=label_name or (), only=only or (),
            span=span_columns,
        )  # fmt: skip
        found = survey(data, columns, skip_unlabelled=skip_unlabelled)
        concepts = tuple(concept or found.labels[:12])
        unknown = [name for name in concepts if name not in found.labels]
        if len(found.labels) < 2 or unknown:
            what = f"no text has the label {unknown[0]!r}" if unknown else "all texts have one label"
            raise DataError(f"{data}: {what}. Labels: {', '.join(found.labels)}.")
        named = [load_sae(text, model) for text in sae] if sae else [load_sae(None, model)]
        if len({n.name for n in named} - {"raw"}) != len(named):
            raise DataError(
                "Two SAEs have one name, or one is called raw. Name them, as in --sae l3=./sae3 --sae l6=./sae6."
            )
        loaded, tokenizer = load_model(model, dtype, device)
        dictionaries = [Dictionary(n.name, Encoder(n.sae, loaded.device), n.site.read) for n in named]
        for dictionary in dictionaries:
            check_width(loaded, dictionary.place, dictionary.encoder, dictionary.name)
        observing = Observing(tokens, context_of(loaded, max_length))
        tokeniser = Tokeniser(tokenizer, observing, found.labels)
        run = Separation(loaded, tokeniser, dictionaries, found.documents, batch_tokens=batch_tokens)
        progress = Progress()
        with writes(out):  # here, and not after an hour of work
            out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=found.texts, desc="texts", unit=" texts", disable=True if quiet else None) as bar:
            for window in windows(Reader(data, columns)):
                run.run(window, progress)
                bar.update(progress.texts - bar.n)
        settings = CalibrationSettings(
            bins=64, alpha=0.5, quantile=0.999, smoothing=1.0, tokens=tokens, choice="separability", cap=8
        )
        scores = run.scores(settings, [found.labels.index(name) for name in concepts])
        about = About(model, data.name, found.texts, tokens, found.labels, found.documents, concepts)
        with writes(out):
            written = write_report(out, about, scores)
        typer.echo(_text(table(scores)))
        typer.echo(f"\n{out / 'report.html'}, and {len(written) - 1} files beside it")


def _text(rows: list[dict[str, object]]) -> str:
    heads = ("scored", "silent", "mean", "chance", "median", "90 %", "most")
    lines = [f"{'place':<16}{'what':<12}" + "".join(f"{head:>8}" for head in heads)]
    for row in rows:
        numbers = "".join(f"{row[key]:>8.3f}" for key in ("mean", "chance", "median", "p90", "largest"))
        lines.append(f"{row['place']:<16}{row['name']:<12}{row['scored']:>8}{row['never_fired']:>8}{numbers}")
    return "\n".join(lines)
