"""The comparison: every method at its default settings, and at the same removal of the concept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sae_steer.errors import DataError
from sae_steer.evaluation.curves import Sample, Summary, at_drop, interval, samples, summary, whole
from sae_steer.evaluation.journal import Journal
from sae_steer.evaluation.measure import Bench, Measured
from sae_steer.evaluation.methods import Method
from sae_steer.evaluation.readout import Readout
from sae_steer.evaluation.result import Claim, Difference, Matched, Measure, Measures, Row

LEVELS = (0.25, 0.5, 0.75)
"""Shares of what full masking takes away at which the methods are compared."""
_LEAST_DROP = 0.01
_NEAR = 0.05  # of full masking's drop: a setting this close to the wanted removal is not refined
_HALVINGS = 3
_Points = dict[str, dict[float, Measured]]


@dataclass(slots=True)
class Comparison:
    """Measures what is needed, once each, and keeps it in a journal.

    Args:
        bench: Texts and model.
        methods: What is compared; full masking among them.
        readouts: Fixed before anything is edited.
        journal: Where measurements are kept.
        progress: Told of tokens done.
        says: Told what is measured next.
    """

    bench: Bench
    methods: Sequence[Method]
    readouts: Sequence[Readout]
    journal: Journal
    progress: Callable[[int], object] | None = None
    says: Callable[[str], object] | None = None
    plain: Measured | None = None
    points: _Points = field(default_factory=dict)

    def run(self, levels: Iterable[float] = LEVELS) -> None:
        """Measures everything that :meth:`unsteered`, :meth:`defaults` and :meth:`matched` sum up.

        Raises:
            DataError: Full masking takes nothing away, so that there is no removal to match.
        """
        for entry in self.journal:
            self._keep(entry["method"], entry["setting"], Measured.of_json(entry["measured"]))
        if self.plain is None:
            self._measure(None, None)
        for method in self.methods:
            for setting in method.defaults:
                self._at(method, setting)
        full = self._drop(self._full, self._full.defaults[0])
        if full < _LEAST_DROP:
            raise DataError(
                f"Masking all chosen features lowers the concept's confidence by {full:.3f}: there is no removal to "
                "match. Calibrate with more features or another layer, or use more text."
            )
        for level in levels:
            for method in self.methods:
                self._search(method, level * full, _NEAR * full)

    @property
    def _full(self) -> Method:
        return next(method for method in self.methods if method.name == "full-mask")

    def _keep(self, method: str | None, setting: float | None, measured: Measured) -> None:
        if method is None or setting is None:
            self.plain = measured
        else:
            self.points.setdefault(method, {})[setting] = measured

    def _measure(self, method: Method | None, setting: float | None) -> Measured:
        if self.says is not None:
            self.says(f"{method.name} {setting:.4g}" if method is not None and setting is not None else "no edit")
        request = method.request(setting) if method is not None and setting is not None else None
        kept = self.bench.measure(request, self.readouts, self.progress).to_json()
        name = method.name if method is not None else None
        self.journal.append({"method": name, "setting": setting, "measured": kept})
        measured = Measured.of_json(kept)  # as a run that goes on from the journal has it
        self._keep(name, setting, measured)
        return measured

    def _at(self, method: Method, setting: float) -> Measured:
        known = self.points.get(method.name, {})
        return known[setting] if setting in known else self._measure(method, setting)

    def _drop(self, method: Method, setting: float) -> float:
        assert self.plain is not None  # measured first
        measured = self._at(method, setting)
        return float(self.plain.target.mean() - measured.target.mean())

    def _search(self, method: Method, drop: float, near: float) -> None:
        """Measures settings around the mildest one that takes ``drop`` away."""
        mild = method.off
        for setting in sorted({*method.grid, *self.points.get(method.name, {})}, key=method.place):
            found = self._drop(method, setting)
            if found >= drop:
                break
            mild = setting
        else:
            return
        strong = setting
        for _ in range(_HALVINGS):
            if abs(found - drop) <= near:
                return
            middle = method.between(mild, strong)
            if middle is None:
                return
            found = self._drop(method, middle)
            mild, strong = (mild, middle) if found >= drop else (middle, strong)

    def sums(self, count: int, seed: int = 0) -> "Sums":
        """Sums up over all texts, and over ``count`` samples of them."""
        assert self.plain is not None  # after run()
        drawn = [whole(self.plain), *samples(self.plain, count, seed)]
        return Sums(self.methods, [self._sum(sample) for sample in drawn])

    def _sum(self, sample: Sample) -> "Sum":
        assert self.plain is not None
        points = {
            name: {setting: summary(measured, sample) for setting, measured in settings.items()}
            for name, settings in self.points.items()
        }
        return Sum(summary(self.plain, sample), points)


@dataclass(frozen=True, slots=True)
class Sum:
    """The measures of all requests over one sample of texts."""

    plain: Summary
    points: dict[str, dict[float, Summary]]

    def reached(self, method: Method, full: Method, level: float) -> tuple[float, Summary] | None:
        """A method where it takes away a share of what full masking takes away over this sample."""
        masked = self.points[full.name][full.defaults[0]]
        drop = level * (self.plain.target_confidence - masked.target_confidence)
        found = at_drop(method, self.points[method.name], self.plain, drop) if drop > 0 else None
        return (found.setting, found.summary) if found is not None else None

    def rise(self, found: Summary) -> float:
        """Rise of perplexity, as a share of what it is without an edit."""
        return found.perplexity / self.plain.perplexity - 1


@dataclass(frozen=True, slots=True)
class Sums:
    """All samples of texts; the first is all of them.

    Args:
        methods: What is compared.
        samples: Their measures.
    """

    methods: Sequence[Method]
    samples: Sequence[Sum]

    @property
    def _full(self) -> Method:
        return next(method for method in self.methods if method.name == "full-mask")

    def _measures(self, found: Sequence[Summary | None]) -> Measures:
        """The measures of one request, one for each sample; the first must be there."""

        def measure(of: Callable[[Sum, Summary], float]) -> Measure:
            values = [of(sum_, s) for sum_, s in zip(self.samples, found, strict=True) if s is not None]
            return Measure(value=values[0], interval=interval(values[1:]))

        return Measures(
            target_accuracy=measure(lambda _, s: s.target_accuracy),
            target_confidence=measure(lambda _, s: s.target_confidence),
            complement_accuracy=measure(lambda _, s: s.complement_accuracy),
            complement_confidence=measure(lambda _, s: s.complement_confidence),
            perplexity=measure(lambda _, s: s.perplexity),
            divergence=measure(lambda _, s: s.divergence),
            drop=measure(lambda a, s: a.plain.target_confidence - s.target_confidence),
            perplexity_rise=measure(lambda a, s: a.rise(s)),
        )

    def unsteered(self) -> Measures:
        """Without any edit."""
        return self._measures([sample.plain for sample in self.samples])

    def defaults(self) -> list[Row]:
        """Each method at the settings that it has by itself."""
        return [
            Row(
                method=method.name,
                knob=method.knob,
                setting=setting,
                measures=self._measures([sample.points[method.name][setting] for sample in self.samples]),
            )
            for method in self.methods
            for setting in method.defaults
        ]

    def matched(self, levels: Iterable[float] = LEVELS) -> list[Matched]:
        """Each method where it takes away the same."""
        rows: list[Matched] = []
        for level in levels:
            for method in self.methods:
                found = [sample.reached(method, self._full, level) for sample in self.samples]
                drawn = found[1:] or found
                measures = self._measures([f[1] if f else None for f in found]) if found[0] is not None else None
                rows.append(
                    Matched(
                        method=method.name,
                        knob=method.knob,
                        level=level,
                        reached=sum(f is not None for f in drawn) / len(drawn),
                        setting=found[0][0] if found[0] is not None else None,
                        measures=measures,
                    )
                )
        return rows

    def claim(self, levels: Iterable[float] = LEVELS) -> Claim:
        """Whether APP's perplexity rises least wherever it is compared, beyond what the samples of texts leave open."""
        app = next((method for method in self.methods if method.name == "app"), None)
        if app is None:
            return Claim(claim="does not", because="APP was not among the methods.", differences=[])
        differences: list[Difference] = []
        faults: list[str] = []
        for level in levels:
            if self.samples[0].reached(app, self._full, level) is None:
                faults.append(f"at {level:.0%} APP does not get there")
                continue
            rivals = [method for method in self.methods if method is not app]
            here = [found for rival in rivals if (found := self._difference(app, rival, level)) is not None]
            differences += here
            faults += _faults(here, level)
        if not differences:
            faults.append("no rival gets there")
        because = "; ".join(faults) if faults else "APP's perplexity rises least at every level, against every rival"
        return Claim(claim="does not" if faults else "holds", because=because + ".", differences=differences)

    def _difference(self, app: Method, rival: Method, level: float) -> Difference | None:
        values: list[float] = []
        for number, sample in enumerate(self.samples):
            mine = sample.reached(app, self._full, level)
            theirs = sample.reached(rival, self._full, level)
            if mine is None or theirs is None:
                if number == 0:
                    return None
                continue
            values.append(sample.rise(mine[1]) - sample.rise(theirs[1]))
        return Difference(rival=rival.name, level=level, value=values[0], interval=interval(values[1:]))


def _faults(found: Sequence[Difference], level: float) -> Iterator[str]:
    """What speaks against APP at one level, in words."""
    larger = [d.rival for d in found if d.interval is not None and d.interval[0] > 0]
    unclear = [d.rival for d in found if d.rival not in larger and (d.interval is None or d.interval[1] >= 0)]
    for rivals, how in ((larger, "larger than"), (unclear, "not clearly below")):
        if rivals:
            yield f"at {level:.0%} APP's rise is {how} that of {', '.join(rivals)}"
