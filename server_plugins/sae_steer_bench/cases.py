"""What is compared: each case says what every request of it carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from sae_steer_bench.errors import BenchError
from sae_steer_bench.records import CasePlan, SaeFacts, ServerFacts

Steering = dict[str, Any]
FEATURES = 8
"""Features that a program edits, over all its layers, where the case does not vary them."""
LAYERS = 4
"""Layers that it edits, likewise."""
TOP = 5
"""Largest features that are read of each token."""
QUICK = frozenset(
    {"plain", "idle", "one", "programs_8", "programs_64", "half", "completion", "readings_named", "readings_top_k"}
)
"""The cases of ``--quick``."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured under one name.

    Args:
        key: Its name for programs.
        label: Its name for people.
        bodies: The field ``steering`` of each request, in turn; None = the request has none.
        edits: Features that a program edits, over all layers.
        layers: Layers where it does.
        plain: Whether the server without the plugin is asked.
        obstacle: Why it cannot be measured on this server; None = it can.
    """

    key: str
    label: str
    bodies: tuple[Steering | None, ...] = (None,)
    edits: int = 0
    layers: int = 0
    plain: bool = False
    obstacle: str | None = None

    @property
    def programs(self) -> tuple[Steering, ...]:
        """The different programs among its bodies."""
        return tuple(body for body in self.bodies if body is not None)

    def plan(self, refused: str | None = None) -> CasePlan:
        """Its record; ``refused`` is what the server said where it refused it."""
        status: Literal["measured", "refused", "skipped"]
        status = "skipped" if self.obstacle is not None else "refused" if refused is not None else "measured"
        return CasePlan(
            key=self.key,
            label=self.label,
            programs=len(self.programs),
            edits=self.edits,
            layers=self.layers,
            status=status,
            reason=self.obstacle or refused,
        )


class Cases:
    """Makes the cases that fit a server.

    Args:
        server: What it has.
        concurrency: Requests at once: more programs than that never run together.
        value: What the first program clamps features to; each further program takes a little more, so that all differ.

    Raises:
        BenchError: It has no SAE to steer with.
    """

    def __init__(self, server: ServerFacts, concurrency: int, value: float) -> None:
        if not server.saes:
            raise BenchError("The server has no SAE, so nothing can be steered. Start it with one (--sae).")
        self._server = server
        self._concurrency = concurrency
        self._value = value
        self._layers = _one_of_each_site(server.saes)

    def all(self, *, plain: bool) -> list[Case]:
        """All of them, in the order of a report; ``plain`` is whether there is a server without the plugin."""
        few = len(self._layers[:LAYERS])
        base = f"{FEATURES} features at {_layers(few)}"
        named = list(range(min(FEATURES, self._layers[0].features)))
        nobody = "no server without the plugin: it takes --launch, or --plain-url"
        return [
            Case("plain", "no plugin", plain=True, obstacle=None if plain else nobody),
            Case("idle", "plugin, nobody steers"),
            self._case("one", f"one program for all: {base}"),
            *(self._programs(count) for count in (8, 32, 64)),
            self._half(),
            self._case("features_1", "1 feature", features=1, layers=1),
            self._case("features_64", f"64 features at {_layers(few)}", features=64),
            self._layer_case(1),
            self._layer_case(LAYERS),
            self._layer_case(len(self._layers), "all"),
            self._case("prompt", "one program, prompt only", positions="prompt"),
            self._case("completion", "one program, completion only", positions="completion"),
            self._readings(
                "readings_named", f"readings of {FEATURES} named features", self._layers[0], {"features": named}
            ),
            self._largest(),
        ]

    def program(
        self, number: int = 0, *, features: int = FEATURES, layers: int = LAYERS, positions: str = "all"
    ) -> Steering:
        """A program that clamps ``features`` features in all, spread over the first ``layers`` layers."""
        saes = self._layers[:layers]
        per_layer = ceil(features / len(saes))
        return {
            "interventions": [
                {
                    "sae": sae.id,
                    "features": [(number * per_layer + i) % sae.features for i in range(min(per_layer, sae.features))],
                    "op": "clamp",
                    "value": self._value * (1 + number / 1000),
                    "positions": positions,
                }
                for sae in saes
            ]
        }

    def _case(
        self, key: str, label: str, *, features: int = FEATURES, layers: int = LAYERS, positions: str = "all"
    ) -> Case:
        program = self.program(features=features, layers=layers, positions=positions)
        return self._with(key, label, (program,))

    def _with(self, key: str, label: str, bodies: Sequence[Steering | None], obstacle: str | None = None) -> Case:
        edits: Sequence[Mapping[str, Any]] = next(body for body in bodies if body)["interventions"]
        count = sum(len(edit["features"]) for edit in edits)
        return Case(key, label, tuple(bodies), count, len(edits), obstacle=obstacle)

    def _programs(self, count: int) -> Case:
        name = "max_programs"
        width = max(len(edit["features"]) for edit in self.program()["interventions"])
        if width > self._server.limits.get("max_ordinary_edits_per_site", width):
            name = "max_wide_programs"
        slots = int(self._server.limits.get(name, count))
        obstacle = None
        if count > slots:
            obstacle = f"the server has {slots} slots for such programs ({name}), so more would wait for one another"
        elif count > self._concurrency:
            obstacle = f"{self._concurrency} requests at once are never more programs: it takes --concurrency {count}"
        bodies = [self.program(number) for number in range(count)]
        return self._with(f"programs_{count}", f"{count} programs", bodies, obstacle)

    def _half(self) -> Case:
        return self._with("half", "one program for every second request", (self.program(), None))

    def _layer_case(self, layers: int, word: str | None = None) -> Case:
        there = len(self._layers)
        key, label = f"layers_{word or layers}", f"2 features a layer at {word or _layers(layers)}"
        if word:
            label = f"2 features a layer at all {there} hooked layers"
        obstacle = None
        if there < layers:
            obstacle = f"the server has SAEs at {_layers(there)} only"
        elif word and there in (1, LAYERS):
            obstacle = f"all is {there} here, which is a case already"
        return self._with(key, label, (self.program(features=2 * min(layers, there), layers=layers),), obstacle)

    def _largest(self) -> Case:
        key, label = "readings_top_k", f"readings of the {TOP} largest features"
        whole = next((sae for sae in self._server.saes if sae.whole), None)
        if whole is None:
            return Case(key, label, obstacle="the server holds no SAE whole (--whole), which this takes")
        return self._readings(key, f"{label} of {whole.features}", whole, {"top_k": min(TOP, whole.features)})

    def _readings(self, key: str, label: str, sae: SaeFacts, what: Mapping[str, object]) -> Case:
        obstacle = None if "readings" in self._server.features else "this server does not offer readings"
        body = {"readings": {"sae": sae.id, **what, "positions": "completion"}}
        return Case(key, label, (body,), obstacle=obstacle)


def _one_of_each_site(saes: Sequence[SaeFacts]) -> list[SaeFacts]:
    """The first SAE of each place, in the server's order."""
    found: dict[str, SaeFacts] = {}
    for sae in saes:
        found.setdefault(sae.site, sae)
    return list(found.values())


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
