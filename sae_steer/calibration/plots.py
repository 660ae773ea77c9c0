"""Figures of calibrations, drawn without a display; matplotlib is imported where one is drawn."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_steer.calibration.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_steer.calibration.separate import Scores
    from sae_steer.calibration.sweep import Cell, Knee

_DPI = 110


def figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple["Figure", Any]:
    """An empty figure of some panels side by side, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(1, columns)


def png(drawn: "Figure") -> bytes:
    """A figure as a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def densities(estimate: Estimate, labels: Sequence[str], concept: int, title: str) -> "Figure":
    """The densities of one feature given each label (the eight largest), and the gain of ``app`` for a concept."""
    drawn, axes = figure()
    density, width = estimate.density[0], float(estimate.width[0])
    bins = density.shape[1] - 1
    edges = np.arange(bins + 1) * width
    shown = sorted(range(len(labels)), key=lambda c: (c != concept, -density[c, 1:].sum()))[:8]
    for c in shown:
        name = f"{labels[c]} (fires {1 - density[c, 0]:.1%})"
        axes.stairs(density[c, 1:] / width, edges, label=name, linewidth=2 if c == concept else 1)
    axes.set_xlabel("activation")
    axes.set_ylabel("density of an observation")
    axes.set_title(title)
    gain = axes.twinx()
    posterior = density[concept, 1:] / density[:, 1:].sum(axis=0)
    gain.plot(
        edges[:-1] + width / 2, 1 - posterior, color="black", linestyle="--", label=f"gain without {labels[concept]}"
    )
    gain.set_ylim(0, 1.05)
    gain.set_ylabel("gain (uniform prior)")
    handles = [*axes.get_legend_handles_labels()[0], *gain.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize="small")
    return drawn


def by_layer(scores: "Sequence[Scores]") -> "Figure":
    """Mean separability at each place, of SAEs and of coordinates, with what chance gives."""
    drawn, axes = figure()
    places = [str(p) for p in sorted({s.place for s in scores}, key=lambda place: place.order)]
    for kind, marker in (("SAE features", "o"), ("raw coordinates", "s")):
        mine = [s for s in scores if (s.name == "raw") == (kind == "raw coordinates")]
        x = [places.index(str(s.place)) for s in mine]
        [line] = axes.plot(x, [s.mean for s in mine], marker=marker, label=kind)
        axes.plot(x, [s.chance for s in mine], marker=marker, markerfacecolor="none", linestyle=":",
                  color=line.get_color(), label=f"{kind}, labels drawn at random")  # fmt: skip
        if kind == "SAE features":
            for s, at in zip(mine, x, strict=True):
                axes.annotate(s.name, (at, s.mean), textcoords="offset points", xytext=(4, 5), fontsize="small")
    axes.set_xticks(range(len(places)), places)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean Jensen-Shannon distance")
    axes.set_title("Concept separability")
    axes.legend(fontsize="small")
    return drawn


def sweep(cells: "Sequence[Cell]", found: "Sequence[Knee]", title: str) -> "Figure":
    """Effect and perplexity by strength, and effect against cost, one line a place; knees are circled."""
    drawn, (effect, perplexity, both) = figure(13.5, 4.2, 3)
    at = {(k.place, k.strength) for k in found}
    for place in dict.fromkeys(cell.place for cell in cells):
        mine = sorted((cell for cell in cells if cell.place == place), key=lambda cell: cell.strength)
        strengths = [cell.strength for cell in mine]
        [line] = effect.plot(strengths, [cell.effect for cell in mine], marker=".", label=place)
        perplexity.plot(strengths, [cell.perplexity for cell in mine], marker=".", color=line.get_color())
        both.plot([cell.cost for cell in mine], [cell.effect for cell in mine], marker=".", color=line.get_color())
        for cell in mine:
            if (place, cell.strength) in at:
                style = {"marker": "o", "s": 120, "facecolors": "none", "edgecolors": line.get_color()}
                effect.scatter([cell.strength], [cell.effect], **style)
                both.scatter([cell.cost], [cell.effect], **style)
                both.annotate(
                    f"{cell.strength:g}", (cell.cost, cell.effect), textcoords="offset points", xytext=(6, -10)
                )
    effect.set_ylabel("change of the target's log-probability, nats a token")
    perplexity.set_ylabel("perplexity on plain text")
    for axes in (effect, perplexity):
        axes.set_xlabel("strength")
    both.set_xlabel("rise of the loss on plain text, nats a token")
    both.set_ylabel("effect, nats a token")
    effect.legend(fontsize="small")
    drawn.suptitle(title)
    return drawn
