"""``sae-steer evaluate``: whether an edit does what it is for, and what it costs."""

from pathlib import Path
from typing import Annotated

import typer

from sae_steer_cli.refusal import imports_of, refusals

SUPPRESSION_HELP = """
Compare ways to suppress a concept: no edit, full mask, range mask, AURA, dampening, and APP at several strengths.

On labelled text that neither the calibration nor the model's edits have seen: how much of the concept a readout still
finds (a logistic regression on final hidden states, fitted on unedited runs before anything is edited), how well the
other labels are still told, perplexity on plain text, and how far the model's next-token distributions on the other
texts move. Each method at its default settings, and where all of them take the same amount of the concept away.

**Example**

    sae-steer evaluate suppression --model MODEL --sae res=SAE --profile profiles/toxic --concept toxic \\
        --train train.csv --data test.csv --plain wikipedia.jsonl --out toxic-report

writes OUT/result.json, OUT/table.md and OUT/plot.png. A run that was stopped goes on where it was (OUT/journal.jsonl).
"""

evaluate = typer.Typer(no_args_is_help=True, help="Measure whether an edit does what it is for, and what it costs.")


@evaluate.callback()
def root() -> None:
    """A group of its own, so that each evaluation has a name."""


@evaluate.command(help=SUPPRESSION_HELP)
def suppression(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Folder or hub id; `demo` = the embedded one.")],
    profile: Annotated[Path, typer.Option(metavar="DIR/NAME", help="A calibrated profile.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Held-out labelled text: .csv, .tsv or .jsonl.")],
    concept: Annotated[str, typer.Option(metavar="LABEL", help="What is to be removed.")],
    plain: Annotated[Path, typer.Option(metavar="FILE", help="Plain text for perplexity: .txt, .jsonl or .csv.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")],
    sae: Annotated[
        str | None, typer.Option(metavar="[NAME=]LOCATION[@SITE]", help="The SAE that the profile is for.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled text for the readout; left out = half of --data, drawn once."),
    ] = None,
    text_column: Annotated[str, typer.Option(metavar="COLUMN", help="Where a row's text is.")] = "text",
    label_column: Annotated[str, typer.Option(metavar="COLUMN", help="Where its label is.")] = "label",
    label_name: Annotated[
        list[str] | None, typer.Option(metavar="VALUE=LABEL", help="Rename a label of the files; repeatable.")
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Of full-mask, range-mask, aura, dampening, app.")
    ] = "full-mask,range-mask,aura,dampening,app",
    strengths: Annotated[str, typer.Option(metavar="A,B", help="Strengths of APP that are reported.")] = "0.5,1,2,4",
    levels: Annotated[
        str, typer.Option(metavar="A,B", help="Shares of full masking's removal at which methods are matched.")
    ] = "0.25,0.5,0.75",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Readouts, each fitted on its own draw of texts.")] = 5,
    samples: Annotated[int, typer.Option(min=0, max=100_000, help="Bootstrap samples of texts.")] = 500,
    pool: Annotated[str, typer.Option(help="What the readout sees of a text: `mean` or `last` token.")] = "mean",
    label_words: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL=WORD,...",
            help="Read the concept from the model's own next token instead: its probability of each label's word.",
        ),
    ] = None,
    plain_texts: Annotated[int, typer.Option(min=1, help="Most plain texts that are used.")] = 400,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a text that are used.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Tokens in a forward pass.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """See ``SUPPRESSION_HELP``."""
    with refusals(), imports_of("calibrate"):
        import matplotlib  # noqa: F401  # before an hour of work, not after it
        import sklearn  # noqa: F401

        from sae_steer_cli.evaluating import Job, run

        run(
            Job(
                model=model,
                sae=sae,
                profile=profile,
                data=data,
                train=train,
                plain=plain,
                concept=concept,
                out=out,
                text_column=text_column,
                label_column=label_column,
                label_names=tuple(label_name or ()),
                methods=tuple(methods.split(",")),
                strengths=_numbers(strengths, "--strengths"),
                levels=_numbers(levels, "--levels"),
                seeds=seeds,
                samples=samples,
                pool=pool,
                label_words=label_words,
                plain_texts=plain_texts,
                max_tokens=max_tokens,
                batch_tokens=batch_tokens,
                dtype=dtype,
                device=device,
                quiet=quiet,
            )
        )


def _numbers(text: str, option: str) -> tuple[float, ...]:
    from sae_steer.errors import StartError

    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise StartError(f"{option} {text!r} is not numbers with commas between them.") from None
    if not all(0 < number <= 1000 for number in found):
        raise StartError(f"{option} {text!r}: each must be above 0, and at most 1000.")
    return found
