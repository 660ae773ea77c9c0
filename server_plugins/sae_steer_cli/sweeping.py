"""What ``sae-steer sweep`` does once its options are read."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_steer.calibration.data import first_texts, survey
from sae_steer.calibration.harvest import context_of
from sae_steer.calibration.model import of_model, of_source
from sae_steer.calibration.observe import beginning
from sae_steer.calibration.plots import png
from sae_steer.calibration.plots import sweep as drawn
from sae_steer.calibration.scoring import Passage, Score, passages
from sae_steer.calibration.sweep import Case, Cell, Journal, Knee, knees, sweep
from sae_steer.catalog import Catalog, CatalogSae, ProfileStore, Vector
from sae_steer.errors import DataError, RequestError, RunFailed, StartError
from sae_steer.sae import Activation
from sae_steer.sites import Site
from sae_steer.whole_files import write_whole
from sae_steer_cli.models import NamedSae, columns_of, load_model, load_sae, location_of
from sae_steer_cli.refusal import writes
from sae_steer_server.settings import DType


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked; the fields are the options of the command."""

    model: str
    saes: tuple[str, ...]
    feature: int | None
    vector: Path | None
    profiles: tuple[Path, ...]
    concept: str | None
    sites: tuple[str, ...]
    op: Literal["add", "clamp", "scale"]
    units: Literal["raw", "reference_max", "residual_norm"]
    strengths: str
    target: Path | None
    phrases: tuple[str, ...]
    prompts: tuple[str, ...]
    plain: Path
    text_column: str
    texts: int
    max_length: int | None
    batch_tokens: int
    dtype: DType
    device: str
    out: Path
    quiet: bool


def run(ask: Sweep) -> None:
    """Sweeps, writes the results and prints them; raises :class:`StartError` where it cannot."""
    strengths = _strengths(ask.strengths)
    if (ask.target is None) == (not ask.phrases) or (ask.phrases and not ask.prompts):
        raise DataError("Give the target: --target FILE, or --phrase TEXT with --prompt TEXT.")
    cases = _cases(ask)
    _check_names(cases)
    plain_texts = _read(ask, ask.plain)
    target_texts = _read(ask, ask.target) if ask.target else []
    model, tokenizer = load_model(ask.model, ask.dtype, ask.device)
    length = context_of(model, ask.max_length)
    plain = _passages(tokenizer, plain_texts, length)
    target = _passages(tokenizer, target_texts, length) if ask.target else _phrases(ask, tokenizer, length)
    settings = _settings(ask, strengths, target, plain, cases, model)
    with writes(ask.out):
        ask.out.mkdir(parents=True, exist_ok=True)
        journal = Journal(ask.out / "sweep.journal.jsonl", settings)
        try:
            with tqdm(total=len(cases) * len(strengths), unit=" cells", disable=True if ask.quiet else None) as bar:
                cells, before, bare = sweep(
                    model, cases, strengths, target, plain, journal, batch_tokens=ask.batch_tokens, tick=bar.update
                )
        except (RequestError, RunFailed) as error:  # the request is made of the options
            raise StartError(error.message) from error
        found = knees(cells)
        _write(ask, cells, found, before, bare)
    typer.echo(_text(cells, found, bare))
    typer.echo(f"\n{ask.out / 'sweep.json'}, {ask.out / 'sweep.png'}")


def _write(ask: Sweep, cells: list[Cell], found: list[Knee], before: Score, bare: Score) -> None:
    result = {
        "what": _title(ask),
        "definition": "effect: change of the target's mean log-probability, nats a token; cost: rise of the loss on "
        "plain text, nats a token; knee: the point (cost, effect), as shares of the largest, farthest above the chord",
        "unsteered": {"target": asdict(before), "plain": asdict(bare), "perplexity": bare.perplexity},
        "cells": [asdict(cell) for cell in cells],
        "knees": [asdict(k) for k in found],
    }
    write_whole(ask.out / "sweep.json", json.dumps(result, indent=1).encode())
    write_whole(ask.out / "sweep.png", png(drawn(cells, found, _title(ask))))


def _strengths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise DataError(f"--strengths {text!r} is not a list of numbers such as 0.5,1,2.")
    return found


def _cases(ask: Sweep) -> list[Case]:
    if (ask.feature is not None) + (ask.vector is not None) + bool(ask.profiles) != 1:
        raise DataError("Say what is swept: one of --feature, --vector and --profile.")
    saes: tuple[str | None, ...] = ask.saes or (None,)
    named = [load_sae(text, ask.model) for text in saes] if ask.vector is None else []
    if ask.profiles:
        return [_concept_case(ask, path, named) for path in ask.profiles]
    if ask.feature is not None and len(named) != 1:
        raise DataError("A feature is of one SAE. Its direction is tried at other places with --site.")
    if ask.feature is not None and not 0 <= ask.feature < named[0].sae.spec.n_features:
        raise DataError(f"SAE {named[0].name!r} has features 0 to {named[0].sae.spec.n_features - 1}.")
    if ask.feature is not None and not ask.sites:
        return [_feature_case(ask, named[0])]
    if not ask.sites:
        raise DataError("Say where the vector is added: --site resid_post.3, once for each place.")
    if ask.units == "reference_max" or ask.op != "add":
        raise DataError("At other places a direction is only added, in units raw or residual_norm.")
    if ask.vector is not None:
        vector = Vector.load("direction", ask.vector)
    else:
        vector = Vector.make("direction", named[0].sae.rows([ask.feature or 0]).dec[0])
    return [_vector_case(ask, vector, text) for text in dict.fromkeys(ask.sites)]


def _check_names(cases: list[Case]) -> None:
    """The results and the journal know a case by its name: two of one name would share their cells."""
    twice = next((name for name, count in Counter(case.name for case in cases).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"Two profiles would both be called {twice!r} here. Sweep each by itself, into its own --out.")


def _feature_case(ask: Sweep, named: NamedSae) -> Case:
    units = {} if ask.op == "scale" else {"units": ask.units}

    def edit(strength: float) -> list[dict[str, Any]]:
        return [{"sae": named.name, "features": [ask.feature], "op": ask.op, "value": strength, **units}]

    return Case(str(named.site), Catalog([_entry(named)]), (), 1, edit)


def _vector_case(ask: Sweep, vector: Vector, site: str) -> Case:
    def edit(strength: float) -> list[dict[str, Any]]:
        return [{"site": site, "vector": vector.name, "op": "add", "value": strength, "units": ask.units}]

    return Case(site, Catalog([], [vector]), (Site.parse(site),), 1, edit)


def _concept_case(ask: Sweep, path: Path, named: list[NamedSae]) -> Case:
    folder = path.absolute()
    try:
        profile = ProfileStore(folder.parent).get(folder.name)
    except RequestError as error:
        raise DataError(f"{folder}: {error.message}") from error
    info = profile.calibration
    if info is None:
        raise DataError(f"The profile {folder} has no calibration. Make one with `sae-steer calibrate`.")
    concept = ask.concept or info.concepts[0]
    mine = next((n for n in named if n.sae.fingerprint == info.sae_fingerprint), None)
    if mine is None:
        raise DataError(f"The profile {folder.name!r} was calibrated on another SAE. Name its own with --sae.")
    # Under the name by which the profile knows it: two profiles may call different SAEs alike.
    entry = CatalogSae.make(info.sae, mine.sae, site=Site.parse(info.site), whole=_needs_whole(mine))

    def edit(strength: float) -> list[dict[str, Any]]:
        how = {"calibration": folder.name, "concept": concept, "strength": strength}
        return [{"op": "app", "sae": info.sae, **how}]

    fingerprint = of_source(location_of(ask.model))
    catalog = Catalog([entry], profiles=folder.parent, writable=False, model=fingerprint)
    return Case(f"{info.site} ({folder.name})", catalog, (), info.settings.cap, edit)


def _entry(named: NamedSae) -> CatalogSae:
    return CatalogSae.make(named.name, named.sae, site=named.site, whole=_needs_whole(named))


def _needs_whole(named: NamedSae) -> bool:
    return named.sae.spec.activation is Activation.TOPK


def _read(ask: Sweep, path: Path) -> list[str]:
    columns = columns_of(text=ask.text_column, label=None, constant="text")
    survey(path, columns)
    return [row.text for row in first_texts(path, columns, ask.texts)]


def _passages(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[Passage]:
    starts = [beginning(tokenizer, text, length) for text in texts]
    return passages(tokenizer(starts, verbose=False)["input_ids"], length)


def _phrases(ask: Sweep, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Passage]:
    found = []
    for prompt in ask.prompts:
        before = tokenizer(prompt)["input_ids"]
        for phrase in ask.phrases:
            ids = [*before, *tokenizer(phrase, add_special_tokens=False)["input_ids"]]
            if not before or len(ids) == len(before) or len(ids) > length:
                raise DataError(
                    f"--prompt {prompt!r} with --phrase {phrase!r}: each needs a token, and both the context."
                )
            found.append(Passage(tuple(ids), len(before)))
    return found


def _settings(
    ask: Sweep,
    strengths: tuple[float, ...],
    target: list[Passage],
    plain: list[Passage],
    cases: list[Case],
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Everything that decides what a cell is; more strengths and places may be asked for later."""
    parts: dict[str, Callable[[], object]] = {
        "model": lambda: of_model(model),
        "dtype": lambda: str(model.dtype),
        "target": lambda: [(text.ids, text.first) for text in target],
        "plain": lambda: [text.ids for text in plain],
        "what": lambda: [ask.feature, ask.op, ask.units, ask.concept],
        "saes": lambda: sorted({e.sae.fingerprint for case in cases for e in case.catalog.saes.values()}),
        "vectors": lambda: sorted({v.fingerprint for case in cases for v in case.catalog.vectors.values()}),
        "profiles": lambda: [
            case.catalog.profile(path.absolute().name).model_dump_json()
            for case, path in zip(cases, ask.profiles, strict=False)
        ],
    }
    return {name: part() for name, part in parts.items()}


def _title(ask: Sweep) -> str:
    if ask.profiles:
        return f"app without {ask.concept or 'the concept'}"
    if ask.vector is not None:
        return f"add {ask.vector.stem} ({ask.units})"
    return f"{ask.op} feature {ask.feature}" + (f" ({ask.units})" if ask.op != "scale" else "")


def _text(cells: list[Cell], found: list[Knee], bare: Score) -> str:
    at = {(k.place, k.strength) for k in found}
    lines = [f"{'place':<28}{'strength':>10}{'effect':>10}{'cost':>10}{'perplexity':>12}{'dose':>8}{'largest':>9}"]
    lines.append(f"{'unsteered':<28}{'':>10}{0:>10.4f}{0:>10.4f}{bare.perplexity:>12.3f}{0:>8.3f}{0:>9.3f}")
    for c in cells:
        mark = "  <- knee" if (c.place, c.strength) in at else ""
        lines.append(
            f"{c.place:<28}{c.strength:>10g}{c.effect:>+10.4f}{c.cost:>+10.4f}{c.perplexity:>12.3f}{c.dose:>8.3f}"
            f"{c.dose_max:>9.3f}{mark}"
        )
    if not found:
        lines.append("No knee: nowhere does the effect grow faster than the cost, or nothing is paid.")
    return "\n".join(lines)
