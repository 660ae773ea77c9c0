"""The work behind ``sae-steer evaluate suppression``: files in, measurements, files out."""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import typer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sae_steer.calibration.data import Columns, Text, first_texts, survey
from sae_steer.calibration.model import of_source
from sae_steer.calibration.store import StoredCalibration
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.errors import DataError, RequestError, StartError
from sae_steer.evaluation.journal import Journal
from sae_steer.evaluation.measure import Bench
from sae_steer.evaluation.methods import methods
from sae_steer.evaluation.plot import draw
from sae_steer.evaluation.readout import Pool, Probe, Readout, Words
from sae_steer.evaluation.result import Material, SuppressionResult, table
from sae_steer.evaluation.suppression import Comparison
from sae_steer.evaluation.texts import Texts
from sae_steer.inprocess import Steer
from sae_steer.limits import Limits
from sae_steer.sae import Activation
from sae_steer_cli.models import DEMO, NamedSae, columns_of, load_model, load_sae, location_of
from sae_steer_cli.refusal import writes
from sae_steer_server.settings import DType

_LEAST_TEXTS = 10
_READOUTS = {
    "mean": "a logistic regression on the mean of final hidden states",
    "last": "a logistic regression on the last token's final hidden state",
    "words": "the model's own probability of each label's word",
}


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line says; see its help."""

    model: str
    sae: str | None
    profile: Path
    data: Path
    train: Path | None
    plain: Path
    concept: str
    out: Path
    text_column: str
    label_column: str
    label_names: tuple[str, ...]
    methods: tuple[str, ...]
    strengths: tuple[float, ...]
    levels: tuple[float, ...]
    seeds: int
    samples: int
    pool: Pool
    label_words: str | None
    plain_texts: int
    max_tokens: int
    batch_tokens: int
    dtype: DType
    device: str
    quiet: bool

    def check(self) -> None:
        """Raises :class:`StartError` for what the options cannot say by themselves."""
        if "full-mask" not in self.methods:
            raise StartError("--methods: full-mask must be among them; the others are matched to what it takes away.")
        if max(self.levels) > 1:
            raise StartError("--levels: a share of what full masking takes away is at most 1.")


def run(job: Job) -> SuppressionResult:
    """Measures, writes the results, and says where they are; raises :class:`StartError` for what cannot be used."""
    job.check()
    with _said():
        model, tokenizer = load_model(job.model, job.dtype, job.device)
        named = load_sae(job.sae, job.model)
        catalog = _catalog(job, named)
        stored = catalog.calibration(job.profile.name, param=str(job.profile))
        compared = methods(
            stored,
            sae=named.name,
            calibration=job.profile.name,
            concept=job.concept,
            strengths=job.strengths,
            names=job.methods,
        )
        labelled, train = _labelled(job, tokenizer, stored)
        limits = _limits(stored)
        with Steer(model, catalog, limits, []) as steer:
            bench = _bench(job, steer, tokenizer, labelled, stored)
            readouts = _readouts(job, bench, train, len(stored.info.labels))
            with _bar(job) as bar, writes(job.out):
                journal = Journal(job.out / "journal.jsonl", _settings(job, stored, bench, train))
                comparison = Comparison(
                    bench, compared, readouts, journal, progress=bar.update, says=bar.set_description
                )
                comparison.run(job.levels)
        sums = comparison.sums(job.samples)
        result = SuppressionResult(
            command=_command(),
            versions={name: version(name) for name in ("torch", "transformers", "scikit-learn")},
            material=_material(job, named, stored, bench, train),
            samples=job.samples,
            unsteered=sums.unsteered(),
            defaults=sums.defaults(),
            matched=sums.matched(job.levels),
            claim=sums.claim(job.levels),
        )
    with writes(job.out):
        _write(job.out, result)
        draw(result, sums, job.out / "plot.png")
    typer.echo(table(result))
    typer.echo(f"\nThe claim that APP's perplexity rises least: {result.claim.claim}. {result.claim.because}")
    typer.echo(f"sae-steer: results in {job.out}", err=True)
    return result


@contextmanager
def _said() -> Iterator[None]:
    """What a request would be refused for ends the command with the same words."""
    try:
        yield
    except RequestError as error:
        raise StartError(error.message) from None


def _catalog(job: Job, named: NamedSae) -> Catalog:
    profile = job.profile.resolve()
    if not (profile / "profile.json").is_file():
        raise StartError(f"--profile {job.profile} has no profile.json. `sae-steer calibrate` makes one.")
    entry = CatalogSae.make(named.name, named.sae, site=named.site, whole=named.sae.spec.activation is Activation.TOPK)
    return Catalog([entry], [], profile.parent, writable=False, model=of_source(location_of(job.model)))


def _limits(stored: StoredCalibration) -> Limits:
    """One program at a time, as wide as the calibration."""
    rows = int(stored.record.features.numel())
    return Limits(max_programs=2, rows=rows, wide_programs=0, max_edits=rows)


def _read(path: Path, columns: Columns, most: int | None = None) -> list[Text]:
    survey(path, columns)
    return first_texts(path, columns, most)


def _labelled(job: Job, tokenizer: PreTrainedTokenizerBase, stored: StoredCalibration) -> tuple[Texts, Texts]:
    """What is evaluated, and what the readout learns from."""
    columns = columns_of(text=job.text_column, label=job.label_column, names=job.label_names)
    held_out = _texts(job, tokenizer, stored, job.data, columns)
    if job.train is not None:
        return held_out, _texts(job, tokenizer, stored, job.train, columns)
    order = np.random.default_rng(0).permutation(len(held_out))
    half = len(order) // 2
    return _some(held_out, order[:half].tolist()), _some(held_out, order[half:].tolist())


def _texts(
    job: Job, tokenizer: PreTrainedTokenizerBase, stored: StoredCalibration, path: Path, columns: Columns
) -> Texts:
    rows = _read(path, columns)
    labels = stored.info.labels
    unknown = sorted({label for row in rows for label in row.labels} - set(labels))
    if unknown:
        raise DataError(f"{path} has the label {unknown[0]!r}, which is not in the profile. Its labels: {labels}.")
    if any(len(row.labels) != 1 for row in rows):
        raise DataError(f"{path}: a text with several labels has no complement. Keep one label a row.")
    return Texts.of(
        tokenizer, [row.text for row in rows], [labels.index(row.labels[0]) for row in rows], job.max_tokens
    )


def _some(texts: Texts, rows: list[int]) -> Texts:
    return Texts(tuple(texts.ids[row] for row in rows), tuple(texts.labels[row] for row in rows))


def _bench(
    job: Job, steer: Steer, tokenizer: PreTrainedTokenizerBase, labelled: Texts, stored: StoredCalibration
) -> Bench:
    concept = stored.concept(job.concept, param="--concept")
    own = [row for row, label in enumerate(labelled.labels) if label == concept]
    others = [row for row, label in enumerate(labelled.labels) if label != concept]
    columns = columns_of(text=job.text_column, label=None)
    written = [row.text for row in _read(job.plain, columns, job.plain_texts)]
    plain = Texts.of(tokenizer, written, [0] * len(written), job.max_tokens)
    return Bench(
        steer,
        target=_some(labelled, own).require(_LEAST_TEXTS, f"of {job.concept!r}"),
        complement=_some(labelled, others).require(_LEAST_TEXTS, "of other labels"),
        plain=plain.require(_LEAST_TEXTS, "of plain text"),
        concept=concept,
        words=_words(job, tokenizer, stored),
        pool=job.pool,
        batch_tokens=job.batch_tokens,
    )


def _words(job: Job, tokenizer: PreTrainedTokenizerBase, stored: StoredCalibration) -> tuple[int, ...] | None:
    """The first token of each label's word."""
    if job.label_words is None:
        return None
    told = dict(item.split("=", 1) for item in job.label_words.split(",") if "=" in item)
    missing = [label for label in stored.info.labels if not told.get(label)]
    if missing:
        raise StartError(f"--label-words has no word for {missing[0]!r}. Write LABEL=WORD for each label.")
    ids = tuple(tokenizer.encode(told[label], add_special_tokens=False)[0] for label in stored.info.labels)
    if len(set(ids)) != len(ids):
        raise StartError("--label-words: two words begin with the same token, so that they cannot be told apart.")
    return ids


def _readouts(job: Job, bench: Bench, train: Texts, labels: int) -> list[Readout]:
    if job.label_words is not None:
        return [Words()]
    pooled = bench.see(train.require(_LEAST_TEXTS, "to fit the readout on")).pooled
    return [Probe.fit(pooled, train.labels, count=labels, seed=seed) for seed in range(job.seeds)]


def _settings(job: Job, stored: StoredCalibration, bench: Bench, train: Texts) -> str:
    """Digest of all that the measurements depend on."""
    parts = {
        "texts": [bench.target, bench.complement, bench.plain, train],
        "calibration": stored.info.model_dump(mode="json"),
        "job": {name: str(value) for name, value in asdict(job).items() if name in _MEASURED},
        "versions": [version("torch"), version("transformers"), version("scikit-learn")],
    }
    return "sha256:" + hashlib.sha256(json.dumps(parts, default=asdict, sort_keys=True).encode()).hexdigest()


_MEASURED = ("concept", "seeds", "pool", "label_words", "dtype", "device")


def _material(job: Job, named: NamedSae, stored: StoredCalibration, bench: Bench, train: Texts) -> Material:
    concept = bench.concept
    return Material(
        model=_model_name(job.model),
        model_fingerprint=stored.info.model,
        sae=named.name,
        sae_fingerprint=stored.info.sae_fingerprint,
        site=str(named.site),
        calibration=job.profile.name,
        calibration_file=stored.info.file,
        concept=job.concept,
        labels=list(stored.info.labels),
        features=int(stored.record.chosen(concept).numel()),
        readout=_READOUTS["words" if job.label_words else job.pool],
        readouts=1 if job.label_words else job.seeds,
        training_texts=0 if job.label_words else len(train),
        target_texts=len(bench.target),
        complement_texts=len(bench.complement),
        plain_texts=len(bench.plain),
        plain_tokens=sum(len(ids) for ids in bench.plain.ids),
    )


def _model_name(model: str) -> str:
    """The last part of a folder, whatever leads there; a hub id as it is."""
    place = Path(location_of(model))
    return place.resolve().name if model != DEMO and place.exists() else model


@contextmanager
def _bar(job: Job) -> "Iterator[tqdm[Any]]":
    disable = True if job.quiet else None  # None: where the output is no terminal, there is no bar
    with tqdm(unit=" tokens", unit_scale=True, disable=disable) as bar:
        yield bar


def _command() -> str:
    """What was typed, with the last part of each path alone."""

    def short(word: str) -> str:
        name, equals, path = word.rpartition("=")
        return name + equals + (Path(path).name if "/" in path else path)

    return shlex.join(["sae-steer", *map(short, sys.argv[1:])])


def _write(folder: Path, result: SuppressionResult) -> None:
    for name, text in (("result.json", result.model_dump_json(indent=1)), ("table.md", table(result))):
        part = folder / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / name)
