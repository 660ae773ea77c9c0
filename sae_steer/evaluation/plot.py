"""The comparison as a picture: what each method costs against what it takes away."""

from pathlib import Path

from sae_steer.evaluation.result import SuppressionResult
from sae_steer.evaluation.suppression import Sums


def draw(result: SuppressionResult, sums: Sums, path: Path) -> None:
    """Writes a PNG: rise of perplexity and KL on the other texts against the fall of the concept's confidence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everything = sums.samples[0]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in sums.methods:
        points = everything.points[method.name]
        rows = [points[setting] for setting in sorted(points, key=method.place)]
        falls = [everything.plain.target_confidence - row.target_confidence for row in rows]
        costs = ([100 * everything.rise(row) for row in rows], [row.divergence for row in rows])
        for axis, cost in zip(axes, costs, strict=True):
            axis.plot([0.0, *falls], [0.0, *cost], marker="o", markersize=3, linewidth=1.2, label=method.name)
    for axis, what in zip(
        axes, ("rise of perplexity on plain text, %", "KL on the other texts, nats a token"), strict=True
    ):
        axis.set_xlabel(f"fall of the confidence in {result.material.concept!r}")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
