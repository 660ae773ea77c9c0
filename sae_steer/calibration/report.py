"""The separability report: one JSON file, PNG plots, and one HTML page that needs no other file."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae_steer.calibration.plots import by_layer, densities, png
from sae_steer.calibration.separate import Scores
from sae_steer.whole_files import write_whole

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class About:
    """What the report is of.

    Args:
        model: The model.
        data: Name of the file.
        texts: Texts that were run.
        tokens: Which tokens were observations.
        labels: All labels.
        documents: Texts of each.
        concepts: The labels whose features are shown.
    """

    model: str
    data: str
    texts: int
    tokens: str
    labels: tuple[str, ...]
    documents: tuple[int, ...]
    concepts: tuple[str, ...]


def table(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """One row for each dictionary and for each place's coordinates."""
    return [
        {
            "place": str(s.place),
            "name": s.name,
            "scored": int(s.values.size),
            "never_fired": s.never_fired,
            "mean": s.mean,
            "chance": s.chance,
            "median": s.quantile(0.5),
            "p90": s.quantile(0.9),
            "largest": s.quantile(1.0),
        }
        for s in scores
    ]


def write_report(folder: Path, about: About, scores: Sequence[Scores]) -> list[Path]:
    """Writes ``separability.json``, ``layers.png``, one plot for each SAE and concept, and ``report.html``."""
    from jinja2 import Environment

    folder.mkdir(parents=True, exist_ok=True)
    images = {"layers.png": png(by_layer(scores))}
    blocks: list[dict[str, Any]] = []
    for s in scores:
        for concept, candidates, estimate in zip(about.concepts, s.candidates, s.estimates, strict=False):
            name = f"{s.name}-{s.place}-{len(blocks)}.png".replace("/", "_")
            if estimate is not None:
                title = f"Feature {candidates[0].feature} of {s.name}, the best for {concept}"
                images[name] = png(densities(estimate, about.labels, about.labels.index(concept), title))
            blocks.append(
                {
                    "concept": concept,
                    "place": str(s.place),
                    "sae": s.name,
                    "candidates": [asdict(c) for c in candidates[:_SHOWN]],
                    "image": base64.b64encode(images[name]).decode() if name in images else None,
                }
            )
    template = files("sae_steer.calibration").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    labels = [{"name": name, "texts": n} for name, n in zip(about.labels, about.documents, strict=True)]
    html = page.render(
        **(asdict(about) | {"labels": labels, "concepts": blocks}),
        rows=table(scores),
        layers=base64.b64encode(images["layers.png"]).decode(),
    )
    contents = images | {"report.html": html.encode(), "separability.json": _json(about, scores).encode()}
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def _json(about: About, scores: Sequence[Scores]) -> str:
    rows = [
        {
            **row,
            "ids": s.ids.tolist(),
            "values": [round(value, 6) for value in s.values.tolist()],
            "best": {
                concept: [asdict(c) for c in found]
                for concept, found in zip(about.concepts, s.candidates, strict=False)
            },
        }
        for row, s in zip(table(scores), scores, strict=True)
    ]
    return json.dumps({**asdict(about), "scores": rows}, indent=1)
