"""What ``sae-steer find`` does once its options are read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from sae_steer.calibration.data import Reader, Survey, first_texts, survey
from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.find import LABELS, POSITIVE, Found, effects, examples, ranked
from sae_steer.calibration.harvest import Harvester, Progress, check_width, context_of, windows
from sae_steer.calibration.info import CalibrationSettings
from sae_steer.calibration.observe import Observed, Observing, Tokeniser
from sae_steer.calibration.scoring import passages
from sae_steer.calibration.statistics import Statistics
from sae_steer.catalog import CatalogSae
from sae_steer.errors import DataError
from sae_steer.sae import Activation, Labels
from sae_steer_cli.models import NamedSae, columns_of, load_model, load_sae
from sae_steer_server.settings import DType


@dataclass(frozen=True, slots=True)
class Search:
    """What is asked; the fields are the options of the command, and ``files`` are in the order of the labels."""

    model: str
    sae: str | None
    files: tuple[Path, Path]
    text_column: str
    only: tuple[str, ...]
    tokens: Literal["last", "all"]
    top: int
    by: Literal["separability", "dprime", "rate", "effect"]
    effect_texts: int
    example_texts: int
    examples: int
    max_length: int | None
    batch_tokens: int
    dtype: DType
    device: str
    quiet: bool

    def reader(self, label: int) -> Reader:
        """The texts of one file, under its label."""
        columns = columns_of(text=self.text_column, label=None, only=self.only, constant=LABELS[label])
        return Reader(self.files[label], columns)

    @property
    def hidden(self) -> bool | None:
        """For tqdm's ``disable``: None = where the output is no terminal."""
        return True if self.quiet else None


def search(ask: Search) -> list[Found]:
    """The features, the best first; raises :class:`~sae_steer.errors.StartError` where it cannot be done."""
    surveys = [_survey(ask, label) for label in range(2)]
    named = load_sae(ask.sae, ask.model)
    model, tokenizer = load_model(ask.model, ask.dtype, ask.device)
    length = context_of(model, ask.max_length)
    encoder = Encoder(named.sae, model.device)
    check_width(model, named.site.read, encoder, named.name)
    tokeniser = Tokeniser(tokenizer, Observing(ask.tokens, length), LABELS)
    harvester = Harvester(model, tokeniser, encoder, named.site.read, ask.batch_tokens)
    statistics = _gather(ask, harvester, surveys)
    settings = CalibrationSettings(
        bins=64, alpha=0.5, quantile=0.999, smoothing=1.0, tokens=ask.tokens, choice="separability", cap=1
    )
    documents = [found.texts for found in surveys]
    # By effect: of the features that separate best, since measuring it takes a run over the texts for each.
    first, count = ("separability", 4 * ask.top) if ask.by == "effect" else (ask.by, ask.top)
    candidates = ranked(statistics, documents, settings, first, count)
    if not candidates:
        raise DataError("No feature fires more on the positive text than on the negative.")
    labels = Labels.load(named.sae.path, named.sae.spec.n_features)
    found = [Found(c, None, entry.label if (entry := labels.get(c.feature)) else None) for c in candidates]
    if ask.effect_texts:
        found = _with_effects(ask, harvester, named, found, length)
        if ask.by == "effect":
            found = sorted(found, key=lambda f: (-(f.effect or 0.0), f.candidate.feature))[: ask.top]
    if ask.example_texts:
        everywhere = Tokeniser(tokenizer, Observing("all", length), LABELS)
        with tqdm(desc="examples", unit=" texts", disable=ask.hidden) as bar:
            features = [f.candidate.feature for f in found]
            texts = _texts(ask, everywhere, ask.example_texts)
            shown = examples(harvester, tokenizer, texts, features, ask.examples, bar.update)
        found = [replace(f, examples=shown[f.candidate.feature]) for f in found]
    return found


def _survey(ask: Search, label: int) -> Survey:
    reader = ask.reader(label)
    return survey(reader.path, reader.columns)


def _gather(ask: Search, harvester: Harvester, surveys: list[Survey]) -> Statistics:
    statistics, progress = Statistics(harvester.encoder.features, 2), Progress()
    with tqdm(total=sum(s.texts for s in surveys), desc="texts", unit=" texts", disable=ask.hidden) as bar:
        for label in range(2):
            for window in windows(ask.reader(label)):
                harvester.run(window, statistics, progress)
                bar.update(progress.texts - bar.n)
    statistics.settle()
    return statistics


def _with_effects(ask: Search, harvester: Harvester, named: NamedSae, found: list[Found], length: int) -> list[Found]:
    tokeniser = harvester.tokeniser
    reader = ask.reader(POSITIVE)
    rows = first_texts(reader.path, reader.columns, ask.effect_texts)
    texts = passages([text.ids for text in tokeniser(rows)], length)
    whole = named.sae.spec.activation is Activation.TOPK
    entry = CatalogSae.make(named.name, named.sae, site=named.site, whole=whole)
    with tqdm(total=len(found), desc="effects", unit=" features", disable=ask.hidden) as bar:
        measured = effects(harvester, entry, [f.candidate.feature for f in found], texts, bar.update)
    return [replace(f, effect=effect) for f, effect in zip(found, measured, strict=True)]


def _texts(ask: Search, tokeniser: Tokeniser, most: int) -> Iterator[list[Observed]]:
    for label in range(2):
        left = most
        for window in windows(ask.reader(label)):
            yield tokeniser(window.texts[:left])
            left -= len(window.texts)
            if left <= 0:
                break
