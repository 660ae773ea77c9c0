"""``sae-steer calibrate``: from labelled text to a profile that suppresses a concept."""

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
    OneSae,
    OnlyRows,
    Quiet,
    SkipUnlabelled,
    SpanColumns,
    TextColumn,
)
from sae_steer_cli.refusal import imports_of, refusals

CALIBRATE_HELP = """
Calibrate concepts of labelled text on a model and one of its SAEs, and write a profile that suppresses them.

The text runs through the model once. What is kept is how each SAE feature's activation is distributed given each label;
the features that tell a concept best are chosen, and the profile attenuates them by how likely the concept is given the
activation seen (op `app`). The rivals `mask_range`, `gain` and `ablate` work from the same profile.

**Examples**

A file with the columns text and label, where label is "toxic" or "other":

    sae-steer calibrate --model ./model --sae ./sae@resid_post.12 --data train.csv --concept toxic --out profiles/toxic

Labels 0 and 1 in a column of their own name, of rows of one split:

    sae-steer calibrate --model org/model --sae res12=org/sae/layer_12 --data comments.csv --label-column toxic
      --label-name 0=other --label-name 1=toxic --only split=train --concept toxic --out profiles/toxic

Several labels a row ("joy|love"), two concepts, every token an observation:

    sae-steer calibrate --model ./model --sae ./sae --data emotions.jsonl --label-column emotions --label-separator "|"
      --concept joy --concept anger --tokens all --out profiles/calm

The sense of a word, at the word itself, told by its first character and the one behind it:

    sae-steer calibrate --model ./model --sae ./sae --data senses.csv --label-column sense --span-columns start,end
      --tokens labelled-span --concept bass_fish --out profiles/no-fish

A model that needs several GPUs, in vLLM:

    sae-steer calibrate --model org/model --sae ./sae@resid_post.30 --data train.csv --concept toxic
      --out profiles/toxic --engine vllm --engine-args '{"tensor_parallel_size": 4}'

**What it needs.** Two labels or more; 50 texts of each are few. Every row is checked before the model runs. A run that
is killed goes on where it was when the same command is given again; no half-written profile can be loaded.

**Then** serve with `--profiles DIR` and ask for `"profiles": ["NAME"]`; the last lines printed say how.
"""


def calibrate(
    model: Model,
    data: LabelledText,
    concept: Annotated[list[str], typer.Option(metavar="LABEL", help="A label to choose features for. Repeatable.")],
    out: Annotated[Path, typer.Option(metavar="DIR/NAME", help="The profile's folder; NAME is what requests call it.")],
    sae: OneSae = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    label_separator: LabelSeparator = None,
    label_name: LabelNames = None,
    only: OnlyRows = None,
    span_columns: SpanColumns = None,
    word_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the labelled word, sought in the text.")
    ] = None,
    skip_unlabelled: SkipUnlabelled = False,
    tokens: Annotated[
        Literal["last", "all", "labelled-span"],
        typer.Option(help="Which tokens of a text are observations: its last, each, or those of the labelled span."),
    ] = "last",
    span_tokens: Annotated[
        Literal["last", "all"], typer.Option(help="Of a span: its last token, where a word is complete, or all.")
    ] = "last",
    skip_bos: Annotated[
        bool, typer.Option("--skip-bos", help="Beginning-of-sequence tokens are neither observed nor, later, edited.")
    ] = False,
    max_length: MaxLength = None,
    choice: Annotated[
        Literal["separability", "dprime"],
        typer.Option(help="Rank features by Jensen-Shannon distance from all other labels, or by d'."),
    ] = "separability",
    cap: Annotated[int, typer.Option(min=1, max=16384, help="Most features chosen for a concept.")] = 64,
    bins: Annotated[int, typer.Option(min=2, max=64, help="Bins of a feature's positive activations.")] = 64,
    alpha: Annotated[float, typer.Option(min=1e-9, max=1e6, help="Pseudo-counts of each label.")] = 0.5,
    quantile: Annotated[
        float, typer.Option(min=0.5, max=1, help="Of the positive activations, where the last bin ends.")
    ] = 0.999,
    smoothing: Annotated[float, typer.Option(min=0, max=100, help="Multiple of Scott's bandwidth.")] = 1.0,
    strength: Annotated[float, typer.Option(min=0, max=1000, help="Exponent of the gain in the profile.")] = 1.0,
    prior: Annotated[
        Literal["uniform", "target", "empirical"],
        typer.Option(help="Prior in the profile: all labels alike, the concepts against the rest, or by their texts."),
    ] = "uniform",
    engine: Annotated[
        Literal["hf", "vllm"], typer.Option(help="What runs the model: transformers, or vLLM where it is installed.")
    ] = "hf",
    engine_args: Annotated[
        str,
        typer.Option(metavar="JSON", help='Arguments of vllm.LLM, such as {"tensor_parallel_size": 2}.'),
    ] = "{}",
    batch_tokens: BatchTokens = 4096,
    dtype: ElementType = "auto",
    device: Device = "auto",
    max_memory_mb: Annotated[
        int, typer.Option(min=8, help="Memory of the histograms; beyond it their bins become wider, and that is said.")
    ] = 256,
    shard_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds of work that a kill may cost; later a twentieth of what was done.")
    ] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Replace a profile of that name.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run of this profile did.")] = False,
    quiet: Quiet = False,
) -> None:
    """See ``CALIBRATE_HELP``."""
    with refusals(), imports_of("calibrate"):
        # Not before: torch takes a second, which --help need not wait for.
        from sae_steer.calibration.info import CalibrationSettings
        from sae_steer.calibration.observe import Observing
        from sae_steer_cli.calibrating import Job, run
        from sae_steer_cli.models import columns_of

        columns = columns_of(
            text=text_column,
            label=label_column,
            separator=label_separator,
            names=label_name or (),
            only=only or (),
            span=span_columns,
            word=word_column,
        )
        settings = CalibrationSettings(
            bins=bins, alpha=alpha, quantile=quantile, smoothing=smoothing, tokens=tokens, choice=choice, cap=cap
        )
        run(
            Job(
                model=model,
                sae=sae,
                data=data,
                columns=columns,
                concepts=tuple(dict.fromkeys(concept)),
                out=out,
                settings=settings,
                observing=Observing(tokens, max_length or 0, span_tokens, skip_bos),
                skip_unlabelled=skip_unlabelled,
                strength=strength,
                prior=prior,
                engine=engine,
                engine_args=engine_args,
                batch_tokens=batch_tokens,
                dtype=dtype,
                device=device,
                bins_held=max_memory_mb * 2**20 // 16,
                shard_seconds=shard_seconds,
                force=force,
                restart=restart,
                quiet=quiet,
            )
        )
