"""APP against its rivals where the truth is known: features that tell a concept by firing, by how much, or not at all.

Four concepts, 48 features: 8 fire for one concept, 32 fire for all and tell them by their amplitude, 8 are noise. A
softmax readout is fitted on unedited activations. Every method goes the way of a request: calibration, compiler,
tables, op.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from sae_steer.calibration.record import Calibration
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.evaluation.curves import Summary, at_drop
from sae_steer.evaluation.methods import Method, methods
from sae_steer.limits import Limits
from sae_steer.sae import open_sae
from sae_steer.slots import Bucket
from sae_steer.tables import SiteTables
from sae_steer_kernels import EditBuffers
from sae_steer_kernels.feature_edit import feature_edit
from tests.calibrations import made_up, write_calibration
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import compile_doc

Floats = NDArray[np.float64]
CONCEPTS = ("a", "b", "c", "d")
FEATURES, FIRING, AMPLITUDE = 48, 8, 32
BINS = 64
SEEDS = (0, 1, 2)


def draw(seed: int, texts: int = 2000) -> tuple[Floats, NDArray[np.int64]]:
    """Activations ``[N, 48]`` and labels ``[N]``."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CONCEPTS), size=texts)
    own = np.arange(FEATURES) % len(CONCEPTS) == labels[:, None]
    fires = np.ones((texts, FEATURES), dtype=bool)
    fires[:, :FIRING] = rng.random((texts, FIRING)) < np.where(own[:, :FIRING], 0.9, 0.05)
    fires[:, FIRING : FIRING + AMPLITUDE] = rng.random((texts, AMPLITUDE)) < 0.9
    fires[:, FIRING + AMPLITUDE :] = rng.random((texts, FEATURES - FIRING - AMPLITUDE)) < 0.5
    mean = np.full((texts, FEATURES), 3.0)
    mean[:, FIRING : FIRING + AMPLITUDE] = np.where(own[:, FIRING : FIRING + AMPLITUDE], 6.0, 2.0)
    return np.where(fires, np.abs(rng.normal(mean, 0.7)), 0.0), labels


def calibrated(acts: Floats, labels: NDArray[np.int64], *, firing_rate: bool = True) -> Calibration:
    """The estimator, literally: an atom at zero, positives smoothed by Scott's bandwidth, half a pseudo-count."""
    concepts, alpha = len(CONCEPTS), 0.5
    density = np.zeros((FEATURES, concepts, 1 + BINS))
    width, chosen = np.zeros(FEATURES), np.zeros((FEATURES, concepts))
    counts, means, stds, aurocs = (np.zeros((FEATURES, concepts)) for _ in range(4))
    for f in range(FEATURES):
        a = acts[:, f]
        positive = a[a > 0]
        width[f] = np.quantile(positive, 0.999) / BINS
        h = positive.std() * positive.size**-0.2 / width[f]
        reach = np.arange(-int(np.ceil(4 * h)), int(np.ceil(4 * h)) + 1)
        kernel = np.exp(-0.5 * (reach / h) ** 2) / np.exp(-0.5 * (reach / h) ** 2).sum()
        for c in range(concepts):
            x, others = a[labels == c], a[labels != c]
            bins = np.minimum((x[x > 0] / width[f]).astype(int), BINS - 1)
            count = np.bincount(bins, minlength=BINS).astype(float)
            smooth = np.convolve(np.pad(count, reach.size // 2), kernel, "valid")
            smooth *= count.sum() / max(smooth.sum(), 1e-9)
            zeros = (x <= 0).sum() if firing_rate else 0.0
            row = np.append(zeros, smooth) + alpha / (BINS + 1)
            density[f, c] = row / row.sum()
            counts[f, c], means[f, c], stds[f, c] = (x > 0).sum(), x[x > 0].mean(), x[x > 0].std()
            order = np.sort(others)
            below = np.searchsorted(order, x, "left") + np.searchsorted(order, x, "right")
            aurocs[f, c], chosen[f, c] = below.mean() / (2 * order.size), x.mean()
    rank = np.full((FEATURES, concepts), -1)
    for c in range(concepts):  # salient: the top 30 % by mean activation on the concept
        rank[np.argsort(-chosen[:, c])[:14], c] = np.arange(14)

    def tensor(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(dtype)

    return replace(
        made_up(range(FEATURES), concepts, bins=BINS),
        width=tensor(width),
        log_density=tensor(np.log(density)),
        fired=tensor(counts, torch.int64),
        mean=tensor(means),
        std=tensor(stds),
        auroc=tensor(aurocs),
        rank=tensor(rank, torch.int32),
    )


@dataclass
class World:
    """One draw: what is held out, the readout, and a catalog with the calibrations."""

    acts: Floats
    labels: NDArray[np.int64]
    readout: LogisticRegression
    catalog: Catalog

    def edited(self, document: dict[str, Any] | None) -> Floats:
        """The held-out activations as a request leaves them; the SAE is the identity."""
        if document is None:
            return self.acts
        program = compile_doc(document, self.catalog, limits=Limits(rows=FEATURES, wide_programs=0))
        assert program is not None
        [part] = program.sites
        tables = SiteTables.fit(
            part.site, self.catalog, buckets=[Bucket(1, FEATURES)], width=FEATURES, width_out=FEATURES,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        tables.write(0, 1, part, program)
        y = torch.from_numpy(self.acts).float()
        ones = torch.ones(len(y), dtype=torch.int32)
        buffers = EditBuffers.empty(tokens=len(y), rows=FEATURES, device=y.device)
        feature_edit(y, ones, ones, torch.tensor(True), tables.tables[0], buffers)
        return y.double().numpy()

    def measure(self, document: dict[str, Any] | None) -> Summary:
        """Concept "a" is to go; divergence is of the readout's distribution, on the other concepts' texts."""
        before = self.readout.predict_proba(self.acts)
        after = self.readout.predict_proba(self.edited(document))
        target, rows = self.labels == 0, np.arange(self.labels.size)
        right = after.argmax(axis=1) == self.labels
        own = after[rows, self.labels]
        divergence = (before * (np.log(before + 1e-30) - np.log(after + 1e-30))).sum(axis=1)
        return Summary(
            float(right[target].mean()), float(own[target].mean()), float(right[~target].mean()),
            float(own[~target].mean()), 1.0, float(divergence[~target].mean()),
        )  # fmt: skip

    def methods(self, name: str = "cal") -> dict[str, Method]:
        stored = self.catalog.calibration(name, param="")
        return {m.name: m for m in methods(stored, sae="id", calibration=name, concept="a")}


def worlds(root: Path) -> Iterator[World]:
    for seed in SEEDS:
        folder = root / str(seed)
        eye = torch.eye(FEATURES)
        zero = torch.zeros(FEATURES)
        write_saelens(
            folder / "id",
            architecture="standard",
            d_in=FEATURES,
            n_features=FEATURES,
            hook_name="blocks.0.hook_resid_post",
            tensors={"W_enc": eye, "W_dec": eye.clone(), "b_enc": zero, "b_dec": zero.clone()},
        )
        entry = CatalogSae.make("id", open_sae(folder / "id"))
        acts, labels = draw(seed)
        for name, rate in (("cal", True), ("without", False)):
            record = calibrated(acts, labels, firing_rate=rate)
            write_calibration(folder / "profiles", name, entry, record, labels=CONCEPTS, model="m")
        readout = LogisticRegression(max_iter=3000).fit(acts, labels)
        held_out, truth = draw(seed + 100)
        yield World(held_out, truth, readout, Catalog([entry], [], folder / "profiles", model="m"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[World]:
    return list(worlds(tmp_path_factory.mktemp("synthetic")))


def test_app_takes_away_most_of_what_masking_does_and_moves_the_rest_least(drawn: list[World]) -> None:
    for world in drawn:
        plain = world.measure(None)
        found = {name: world.measure(m.request(m.defaults[0])) for name, m in world.methods().items() if name != "app"}
        app = world.measure(world.methods()["app"].request(1.0))
        assert plain.target_confidence > 0.95
        full = found["full-mask"]
        assert plain.target_confidence - full.target_confidence > 0.5
        assert plain.target_confidence - app.target_confidence >= 0.6 * (
            plain.target_confidence - full.target_confidence
        )
        assert app.divergence <= full.divergence / 5
        assert app.divergence <= found["range-mask"].divergence


def test_both_hold_at_matched_removal(drawn: list[World]) -> None:
    for world in drawn:
        plain = world.measure(None)
        known = world.methods()
        curves = {
            name: {setting: world.measure(known[name].request(setting)) for setting in known[name].grid}
            for name in ("full-mask", "range-mask", "app")
        }
        masked = curves["full-mask"][known["full-mask"].defaults[0]]
        drop = 0.6 * (plain.target_confidence - masked.target_confidence)
        at = {name: at_drop(known[name], curve, plain, drop) for name, curve in curves.items()}
        app, mask, ranged = at["app"], at["full-mask"], at["range-mask"]
        assert app is not None
        assert mask is not None
        assert app.summary.target_confidence == pytest.approx(mask.summary.target_confidence)
        assert app.summary.divergence <= masked.divergence / 5
        assert app.summary.divergence < mask.summary.divergence
        assert ranged is None or app.summary.divergence <= ranged.summary.divergence


def test_without_the_firing_rates_less_is_taken_away(drawn: list[World]) -> None:
    for world in drawn:
        right = world.measure(world.methods()["app"].request(1.0))
        wrong = world.measure(world.methods("without")["app"].request(1.0))
        assert wrong.target_confidence > 2 * right.target_confidence
        gains = {name: _gains_of_what_fires_for_it_alone(world, name) for name in ("cal", "without")}
        assert max(gains["cal"]) < 0.3
        assert min(gains["without"]) > 0.5


def _gains_of_what_fires_for_it_alone(world: World, name: str) -> list[float]:
    """Mean gains, over the bins where most activations are, of the features that fire for concept "a" alone."""
    program = compile_doc(
        world.methods(name)["app"].request(1.0), world.catalog, limits=Limits(rows=FEATURES, wide_programs=0)
    )
    assert program is not None
    own = [row for row in program.sites[0].rows if row.feature < FIRING]
    assert {row.feature for row in own} == {0, 4}
    means = []
    for row in own:
        assert row.gain is not None
        places = [int(f / row.gain.width_pos) for f in (2.5, 3.0, 3.5)]
        means.append(float(row.gain.values()[places].mean()))
    return means


def test_shuffled_labels_give_a_gain_near_one_less_the_prior(tmp_path: Path) -> None:
    acts, labels = draw(0)
    shuffled = np.random.default_rng(1).permutation(labels)
    record = calibrated(acts, shuffled)
    joint = record.log_density.double().exp()
    seen = record.log_density[:, :, 1:].exp().sum(dim=1) > 0.02  # bins that hold some observations
    gain = 1 - joint[:, 0, 1:] / joint[:, :, 1:].sum(dim=1)
    assert float((gain[seen] - 0.75).abs().mean()) < 0.05
