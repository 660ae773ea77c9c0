"""What ``sae-steer calibrate`` does once its options are read."""

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import typer
from tqdm import tqdm

from sae_steer.calibration.choose import Choice, calibration_of, choose
from sae_steer.calibration.data import Columns, Survey, survey
from sae_steer.calibration.estimate import ENOUGH
from sae_steer.calibration.gather import Engine, Gathered, gather
from sae_steer.calibration.harvest import BATCH_TOKENS, Progress
from sae_steer.calibration.info import CalibrationInfo, CalibrationSettings
from sae_steer.calibration.model import of_model, of_source
from sae_steer.calibration.observe import Observing
from sae_steer.calibration.profile import check_target, write_profile
from sae_steer.calibration.shards import Shards
from sae_steer.errors import DataError
from sae_steer.limits import Limits
from sae_steer.sae import Activation, Labels
from sae_steer_cli.models import NamedSae, load_model, load_sae, location_of
from sae_steer_server.settings import DType


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked; the fields are the options of the command."""

    model: str
    sae: str | None
    data: Path
    columns: Columns
    concepts: tuple[str, ...]
    out: Path
    settings: CalibrationSettings
    observing: Observing
    skip_unlabelled: bool
    strength: float
    prior: Literal["uniform", "target", "empirical"]
    engine: Literal["hf", "vllm"]
    engine_args: str
    batch_tokens: int
    dtype: DType
    device: str
    bins_held: int
    shard_seconds: float
    force: bool
    restart: bool
    quiet: bool


def run(job: Job) -> None:
    """Calibrates, writes the profile and prints what came of it; raises :class:`StartError` where it cannot."""
    out = job.out.absolute()
    check_target(out, force=job.force)
    if job.observing.tokens == "labelled-span" and not job.columns.spans:
        raise DataError(
            "--tokens labelled-span needs to know the span: --span-columns START,END or --word-column NAME."
        )
    found = _survey(job)
    named = load_sae(job.sae, job.model)
    engine, observing, fingerprint = _engine(job, named, found)
    with _shards(job, out, found, named, observing, fingerprint) as shards:
        began = time.monotonic()
        gathered = _gather(job, engine, named, found, shards)
        seconds = time.monotonic() - began
        _check(gathered, found)
        choice, info, features = _write(job, out, found, named, gathered, fingerprint)
        shards.remove()
    typer.echo(_summary(job, named, found, gathered, choice, info, seconds))
    typer.echo("\n".join(_how_to_use(job, named, features)))


def _write(
    job: Job, out: Path, found: Survey, named: NamedSae, gathered: Gathered, fingerprint: str
) -> tuple[Choice, CalibrationInfo, int]:
    """Estimates, and writes the profile; what was chosen, what it was made from, and its number of features."""
    concepts = [found.labels.index(concept) for concept in job.concepts]
    choice = choose(gathered.statistics, found.documents, job.settings, concepts)
    calibration = calibration_of(gathered.statistics, found.documents, job.settings, concepts, choice)
    info = CalibrationInfo(
        file="sha256:" + "0" * 64,  # set where the file is written
        sae=named.name,
        sae_fingerprint=named.sae.fingerprint,
        model=fingerprint,
        site=str(named.site),
        labels=list(found.labels),
        concepts=list(job.concepts),
        documents=list(found.documents),
        observations=gathered.statistics.observations.tolist(),
        never_fired=choice.never_fired,
        settings=job.settings,
    )
    write_profile(
        out,
        calibration,
        info,
        description=f"Suppresses {', '.join(job.concepts)}; calibrated on {found.texts} texts of {job.data.name}.",
        strength=job.strength,
        prior=job.prior,
        skip_bos=job.observing.skip_bos,
        force=job.force,
    )
    return choice, info, calibration.features.numel()


def _survey(job: Job) -> Survey:
    """Checks every row and the concepts, before any model is loaded."""
    size = job.data.stat().st_size if job.data.is_file() else 0
    with tqdm(total=size, desc="checking", unit="B", unit_scale=True, disable=_hidden(job.quiet), leave=False) as bar:
        found = survey(job.data, job.columns, skip_unlabelled=job.skip_unlabelled, progress=bar.update)
    counts = ", ".join(f"{label} ({n})" for label, n in zip(found.labels, found.documents, strict=True))
    missing = [concept for concept in job.concepts if concept not in found.labels]
    if missing:
        raise DataError(f"{job.data}: no text has the label {missing[0]!r}. Labels: {counts}.")
    if len(found.labels) < 2:
        raise DataError(
            f"{job.data}: all texts have one label, {counts}. A concept is told from something else: add texts without "
            "it, under another label."
        )
    few = [f"{label} ({n})" for label, n in zip(found.labels, found.documents, strict=True) if n < ENOUGH]
    if few:
        _warn(f"fewer than {ENOUGH} texts of {', '.join(few)}: their densities are widened and say less.")
    if found.skipped:
        _warn(f"{found.skipped} rows without a label were left out.")
    return found


def _engine(job: Job, named: NamedSae, found: Survey) -> tuple[Engine, Observing, str]:
    """What runs the model, with the tokens of a text that it takes, and the model's fingerprint."""
    if job.engine == "vllm":
        if job.device != "auto" or job.batch_tokens != BATCH_TOKENS:
            raise DataError(
                "--device and --batch-tokens are transformers'. Say in --engine-args what vLLM is to do, such as "
                '{"max_num_batched_tokens": 8192}.'
            )
        from sae_steer_cli.calibrating_vllm import vllm_engine

        return vllm_engine(job.model, job.engine_args, job.dtype, job.observing, named, found.labels, job.bins_held)
    from sae_steer.calibration.encode import Encoder
    from sae_steer.calibration.harvest import Harvester, check_width, context_of
    from sae_steer.calibration.observe import Tokeniser

    model, tokenizer = load_model(job.model, job.dtype, job.device)
    observing = replace(job.observing, max_length=context_of(model, job.observing.max_length or None))
    encoder = Encoder(named.sae, model.device)
    check_width(model, named.site.read, encoder, named.name)
    tokeniser = Tokeniser(tokenizer, observing, found.labels)
    fingerprint = of_source(location_of(job.model)) or of_model(model)
    return Harvester(model, tokeniser, encoder, named.site.read, job.batch_tokens), observing, fingerprint


def _shards(job: Job, out: Path, found: Survey, named: NamedSae, observing: Observing, fingerprint: str) -> Shards:
    """Where partial statistics are; what they depend on is its manifest, and the estimator's settings are not."""
    folder = out.parent / f".{out.name}.partial"
    manifest: dict[str, Any] = {
        "data": found.identity,
        "labels": list(found.labels),
        "skip_unlabelled": job.skip_unlabelled,
        "model": fingerprint,
        "sae": named.sae.fingerprint,
        "site": str(named.site),
        "observing": [observing.tokens, observing.span, observing.skip_bos, observing.max_length],
        "engine": [job.engine, job.dtype],
        "batch_tokens": job.batch_tokens,
    }
    try:
        return Shards(folder, manifest, restart=job.restart)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or type(error).__name__}.") from error


def _gather(job: Job, engine: Engine, named: NamedSae, found: Survey, shards: Shards) -> Gathered:
    with tqdm(total=found.texts, desc="texts", unit=" texts", disable=_hidden(job.quiet)) as bar:
        began: list[tuple[float, int]] = []

        def report(progress: Progress) -> None:
            began.append((time.monotonic(), progress.tokens))
            del began[1:-1]
            (start, before), (now, tokens) = began[0], began[-1]
            if now > start:
                bar.set_postfix_str(f"{tokens} tokens, {(tokens - before) / (now - start):.0f}/s", refresh=False)
            if bar.n == 0:
                bar.initial = progress.texts  # of an earlier run: they say nothing of this one's speed
            bar.update(progress.texts - bar.n)

        return gather(
            engine,
            job.data,
            job.columns,
            shards,
            features=named.sae.spec.n_features,
            labels=len(found.labels),
            limit=job.bins_held,
            every=job.shard_seconds,
            report=report,
        )


def _check(gathered: Gathered, found: Survey) -> None:
    empty = [label for label, n in zip(found.labels, gathered.statistics.observations, strict=True) if n == 0]
    if empty:
        raise DataError(
            f"No token of the label {empty[0]!r} was observed: its spans lie beyond what the model takes of a text. "
            "Raise --max-length, or shorten the texts."
        )
    if gathered.progress.texts != found.texts:
        raise DataError(f"{gathered.progress.texts} texts were run, and the file had {found.texts}: it was changed.")


def _hidden(quiet: bool) -> bool | None:
    """For tqdm's ``disable``: None = where the output is no terminal."""
    return True if quiet else None


def _warn(text: str) -> None:
    typer.echo(f"sae-steer: {text}", err=True)


def _summary(
    job: Job,
    named: NamedSae,
    found: Survey,
    gathered: Gathered,
    choice: Choice,
    info: CalibrationInfo,
    seconds: float,
) -> str:
    lines = ["", f"{'label':<24}{'texts':>10}{'observations':>14}"]
    for label, texts, seen in zip(found.labels, found.documents, info.observations, strict=True):
        lines.append(f"{label:<24}{texts:>10}{seen:>14}")
    labels = Labels.load(named.sae.path, named.sae.spec.n_features)
    for concept, candidates in zip(job.concepts, choice.candidates, strict=True):
        lines += ["", f"{concept}: {len(candidates)} features, the best first"]
        lines.append(f"{'feature':>9}{'distance':>10}{'d-prime':>10}{'AUROC':>8}{'fires':>8}{'else':>8}  label")
        for c in candidates[:10]:
            known = labels.get(c.feature)
            lines.append(
                f"{c.feature:>9}{c.distance:>10.3f}{c.dprime:>10.2f}{c.auroc:>8.3f}{c.rate:>8.1%}{c.rate_rest:>8.1%}"
                f"  {known.label or '' if known else ''}"
            )
    progress, sketch = gathered.progress, gathered.statistics.sketch
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    here = progress.texts - gathered.resumed
    lines += ["", f"{choice.never_fired} of {named.sae.spec.n_features} features never fired; their gain would be 1."]
    if progress.cut:
        lines.append(f"{progress.cut} texts were longer than the model takes, and cut there.")
    if progress.unseen:
        lines.append(f"{progress.unseen} texts had their span beyond that, and were not observed.")
    lines.append(f"Activations are known to {sketch.error:.1%}.")
    lines.append(f"{progress.tokens} tokens; {here} texts now, in {seconds:.1f} s; at most {peak:.0f} MB of memory.")
    return "\n".join([*lines, ""])


def _how_to_use(job: Job, named: NamedSae, features: int) -> list[str]:
    name, folder = job.out.name, job.out.absolute().parent
    demo = job.model == "demo" and job.sae is None
    serve = (
        "sae-steer serve demo" if demo else f"sae-steer serve {job.model} --sae {named.name}={_location(job, named)}"
    )
    if named.sae.spec.activation is Activation.TOPK and not demo:
        serve += f" --whole {named.name}"
    limits = Limits()
    if features > limits.widest:
        serve += f" --wide-features {features}"
    if features > limits.max_edits:
        serve += f" --max-edits {features}"
    model = "demo" if demo else Path(job.model).name
    return [
        f"{job.out.absolute()} suppresses {', '.join(job.concepts)}:",
        "",
        f"    {serve} --profiles {folder}",
        "    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '",
        f'      {{"model": "{model}", "prompt": "Once", "steering": {{"profiles": ["{name}"]}}}}\'',
        "",
        "or with any OpenAI client:",
        "",
        f'    client.completions.create(model="{model}:{name}", prompt="Once")',
        f'    client.completions.create(model="{model}", prompt="Once", extra_body={{"steering": {{"interventions": [',
        f'        {{"op": "app", "sae": "{named.name}", "calibration": "{name}", "concept": "{job.concepts[0]}", '
        '"strength": 2.0}]}})',
    ]


def _location(job: Job, named: NamedSae) -> str:
    text = (job.sae or "").removeprefix(f"{named.name}=")
    return text if "@" in text or named.sae.spec.site is not None else f"{text}@{named.site}"
