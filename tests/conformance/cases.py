"""The one list of cases that every path of :mod:`tests.conformance.test_conformance` must answer alike.

To add a case, add it to :data:`CASES`; that is all. A case is

- its requests, in waves: those of one wave are sent together, and a wave is sent when the one before it is answered;
- for each request a prompt of :data:`PROMPTS`, and what it asks in the field ``steering``;
- the wrong variant that it ``kills``, a name of :mod:`tests.conformance.wrong`. If no variant there is what the case
  is for, write one: a few lines that make the running plugin wrong in that way. A test switches it on and wants the
  case to fail.

Then run ``pytest tests/conformance -k "Definition or Attach"``, which takes seconds. It demands of the definition
itself (float64) that each steered request fires, that it moves a token of the plain answer, that no choice of a token
is so close that float32 may decide it otherwise, and that no answer reaches the end of the sequence. Where it
complains, choose other features, values or prompts.

All paths run the model that ships with the package, in float32, with the limits below, which are small on purpose:
prompts come in chunks, slots are waited for, and the key-value cache overflows.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae_steer import embedded
from sae_steer.calibration.model import of_folder
from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.limits import Limits
from sae_steer.sae import open_sae
from tests.calibrations import made_up, write_calibration

SAE = embedded.SAE_NAME
SITES = ("resid_post.1", "resid_mid.4")
"""Places beside the SAE's own, ``resid_post.3``; in a pipeline of two stages they lie on both sides of the cut."""

# Features of the SAE by what they are about; features.json beside it says so.
SEA, TRAINS, SPACE, MUSIC, SCHOOL, SNOW, FOOD = 551, 465, 234, 103, 621, 58, 35
FIRING = [727, 99, 383, 166, 638, 504, 516, 124, 520, 551, 259, 536, 116, 131, 275, 40, 92, 244, 767, 289]
"""The features that fire most on the prompt "sea", strongest first."""

BLOCK = 32
"""Tokens of a block of the prefix cache."""
STEP_TOKENS = 64
"""Most tokens of a forward pass: longer prompts come in chunks."""
CACHE_BLOCKS = 13
"""Blocks of the key-value cache; one is vLLM's own."""
CONTEXT = 192
MAX_PROGRAMS = 4
LIMITS = Limits(max_programs=MAX_PROGRAMS, rows=8, wide_programs=2, wide_rows=64)

PROMPTS = {
    "sea": ["Tell me about the sea."],
    "garden": ["Tell me about my garden."],
    "piano": ["Tell me a story about music and the moon."],
    "long": [
        "Tell me about the sea.",
        "I dreamed about the sea. I saw a castle made of sand. The tide came in and the shells slowly went away. "
        "I saw a sailor with a long beard. The waves were high that day.",
        "Tell me about trains.",
    ],
    "longer": [
        "Tell me about my garden.",
        "I wanted to pick flowers, so I went to the greenhouse. I saw a yellow butterfly. The leaves whispered in the "
        "wind. I saw a yellow butterfly. The leaves whispered in the wind.",
        "Tell me about animals.",
        "A hedgehog rolls up when a fox comes near. I like rabbits. A hen keeps its eggs in a nest. I like rabbits.",
        "Tell me about the sea.",
    ],
}
"""Chats by name: user and assistant in turn."""


@dataclass(frozen=True)
class Ask:
    """One request; greedy.

    Args:
        prompt: Name of a prompt.
        steering: The field ``steering``.
        tokens: Completion tokens.
        choices: ``n``, all of them greedy.
        first: Tokens of the prompt that are sent; None = all.
        after: The prompt comes behind the first request, with its answer, of this wave.
        cached: Tokens of the prompt that vLLM must take from its prefix cache; None = as many as it likes.
        fails: Code of the error that it must end with.
    """

    prompt: str
    steering: dict[str, Any] | None = None
    tokens: int = 12
    choices: int = 1
    first: int | None = None
    after: int | None = None
    cached: int | None = None
    fails: str | None = None


Wave = tuple[Ask, ...]


@dataclass(frozen=True)
class Case:
    """Requests and when they are sent.

    Args:
        name: Its name.
        kills: The wrong variants that must fail it.
        waves: The requests.
    """

    name: str
    kills: tuple[str, ...]
    waves: tuple[Wave, ...]


def edit(features: list[int], op: str, **more: Any) -> dict[str, Any]:
    """An intervention on features."""
    return {"sae": SAE, "features": features, "op": op, **more}


def vector(name: str, site: str, op: str, **more: Any) -> dict[str, Any]:
    """An intervention along a plain direction."""
    return {"site": site, "vector": name, "op": op, **more}


def asked(*interventions: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A field ``steering``."""
    return {"interventions": list(interventions), **more}


def single(name: str, kills: str, *interventions: dict[str, Any], prompt: str = "sea", **more: Any) -> Case:
    """A case of one request."""
    return Case(name, (kills,), ((Ask(prompt, asked(*interventions, **more)),),))


def clamp(feature: int, value: float = 40.0, **more: Any) -> dict[str, Any]:
    """A field ``steering`` that clamps a feature."""
    return asked(edit([feature], "clamp", value=value, **more))


_GATE = {"sae": SAE, "feature": SEA}
_ALL = clamp(TRAINS)
_PROMPT = clamp(TRAINS, 60.0, positions="prompt")
_COMPLETION = clamp(TRAINS, positions="completion")

OPERATIONS = (
    single("clamp", "f' written for f' - f", edit([SEA, TRAINS], "clamp", value=[10.0, 30.0])),
    single("clamp to the recorded maximum", "residual alone", edit([SEA], "clamp", value=1.0, units="reference_max")),
    single("ablate", "residual alone", edit([SEA], "ablate")),
    single("add", "raw units", edit([SPACE], "add", value=0.5, units="residual_norm")),
    single("scale", "f' written for f' - f", edit([SEA], "scale", value=3.0)),
    single("gain", "first row alone", edit([*FIRING[:4], SEA], "gain", value=[1.0, 1.0, 0.9, 1.0, 0.1])),
    single("floor", "no bounds", edit([TRAINS], "floor", value=30.0)),
    single("cap", "no bounds", edit([SEA], "cap", value=3.0)),
    single("mask_range", "no mask", edit([SEA], "mask_range", lo=1.0, hi=100.0)),
    single("gate above", "no gate", edit([TRAINS], "clamp", value=40.0, when=_GATE | {"above": 5.0})),
    single("gate below", "no gate", edit([TRAINS], "clamp", value=40.0, when=_GATE | {"below": 5.0})),
    single("drop the error", "error kept", edit([TRAINS], "clamp", value=20.0), error="drop"),
    single(
        "dose scaled",
        "no dose limit",
        edit([TRAINS], "clamp", value=40.0),
        dose={"limit": 0.4, "on_dose": "scale"},
    ),
    Case(
        "dose that fails",
        ("dose never fails",),
        ((Ask("sea", _ALL | {"dose": {"limit": 0.4}}, fails="dose_exceeded"), Ask("sea")),),
    ),
    single("vector added", "vector of length one", vector("away", "resid_post.1", "add", value=0.5)),
    single("vector ablated", "vector as stored", vector("sea", "resid_post.3", "ablate")),
    single("vector inside a layer", "vector as stored", vector("away", "resid_mid.4", "clamp", value=10.0)),
    single(
        "two places",
        "first place alone",
        vector("away", "resid_post.1", "add", value=0.1, units="residual_norm"),
        edit([TRAINS], "clamp", value=30.0),
        vector("away", "resid_mid.4", "cap", value=0.0),
    ),
    single("profile", "first row alone", prompt="long", profiles=["boats-not-trains"]),
    single(
        "profile overridden",
        "first row alone",
        edit([SEA], "ablate"),
        prompt="long",
        profiles=["boats-not-trains"],
        override=True,
    ),
    single("wide program", "wide slots idle", edit(FIRING, "scale", value=1.3)),
)

CALIBRATION = "topics"
CONCEPTS = ("sea", "trains", "space", "music")


def by_calibration(op: str, concept: str = "sea", **more: Any) -> dict[str, Any]:
    """An intervention on the features that the calibration chose for a concept."""
    return {"sae": SAE, "calibration": CALIBRATION, "concept": concept, "op": op, **more}


CALIBRATED = (
    single("app", "no gain table", by_calibration("app")),
    single("app with a strength", "strength of one", by_calibration("app", strength=6.0, prior="empirical")),
    single(
        "app of two concepts",
        "no gain table",
        by_calibration("app", prior="target", strength=2.0),
        by_calibration("app", "music", prior="target", strength=2.0, top=6),
    ),
    single(
        "app on the completion",
        "strength of one",
        by_calibration("app", strength=6.0, positions="completion"),
        prompt="long",
    ),
    single(
        "app of a profile overridden",
        "strength of one",
        by_calibration("app", strength=4.0, top=6),
        profiles=[CALIBRATION],
        override=True,
    ),
    single("mask_range by a calibration", "no mask", by_calibration("mask_range", sigmas=40.0)),
    single("gain by a calibration", "residual alone", by_calibration("gain", "trains"), prompt="long"),
    single("ablate by a calibration", "residual alone", by_calibration("ablate", "trains")),
)

POSITIONS = (
    Case("prompt", ("one token means completion",), ((Ask("long", _PROMPT),),)),
    Case("completion", ("one token means completion", "completion from P"), ((Ask("sea", _COMPLETION),),)),
    single("ranges", "ranges closed", edit([TRAINS], "clamp", value=60.0, positions={"ranges": [[1, 3], [5, 8]]})),
    single("skip_bos", "no skip_bos", edit([TRAINS], "clamp", value=60.0, positions="prompt", skip_bos=True)),
    single("token_in", "any token", edit([TRAINS], "clamp", value=60.0, when={"token_in": [312, 266]})),
    single(
        "two positions in one program",
        "one selector",
        edit([TRAINS], "clamp", value=60.0, positions="prompt"),
        edit([SPACE], "add", value=20.0, positions="completion"),
        edit([SEA], "ablate", positions={"ranges": [[0, 4]]}),
    ),
    single(
        "two positions at two places",
        "one selector",
        vector("away", "resid_post.1", "add", value=0.4, positions="completion"),
        edit([MUSIC], "clamp", value=20.0, positions={"ranges": [[2, 30]]}),
    ),
    single(
        "prompt in chunks",
        "positions from the step's start",
        edit([SNOW], "clamp", value=40.0, positions={"ranges": [[66, 90]]}),
        edit([MUSIC], "clamp", value=20.0, positions="completion"),
        prompt="longer",
    ),
    Case(
        "chunk of one token",
        ("one token means completion",),
        # The first request leaves one token of the first step to the second, whose prompt is longer than that.
        ((Ask("longer", first=STEP_TOKENS - 1), Ask("sea", _COMPLETION)),),
    ),
)

BATCHES = (
    Case(
        "mixed batch",
        ("neighbour's program",),
        (
            (
                Ask("sea"),
                Ask("sea", _ALL),
                Ask("garden"),
                Ask("garden", _PROMPT),
                Ask("sea", clamp(SPACE)),
                Ask("piano"),
                Ask("piano", _COMPLETION),
            ),
        ),
    ),
    Case("two choices", ("first choice alone",), ((Ask("sea", _ALL, choices=2), Ask("sea", choices=2)),)),
    Case(
        "shared slot",
        ("slot freed by the first who leaves",),
        (
            (
                Ask("sea", _ALL, tokens=4),
                Ask("sea", _ALL, tokens=16),
                Ask("garden", _PROMPT),
                *(Ask("sea", clamp(feature)) for feature in (SPACE, SCHOOL, FOOD)),
            ),
        ),
    ),
    Case(
        "more programs than slots",
        ("no waiting",),
        (tuple(Ask("sea", clamp(feature), tokens=8) for feature in (TRAINS, SPACE, MUSIC, SCHOOL, SNOW, FOOD)),),
    ),
    Case(
        "preemption",
        ("counted again after a preemption",),
        # The last to come is the one that gives way.
        (
            (
                Ask("long", tokens=16),
                *(Ask("long", clamp(feature), tokens=16) for feature in (SPACE, MUSIC, SCHOOL, SNOW)),
            ),
        ),
    ),
)

CACHE = (
    Case(
        "cache: plain, then steered, then both",
        ("no cache key",),
        (
            (Ask("longer", cached=0),),
            (Ask("longer", _ALL, cached=0),),
            (
                Ask("longer", cached=2 * BLOCK),
                Ask("longer", _ALL, cached=2 * BLOCK),
                Ask("longer", clamp(SPACE), cached=0),
            ),
        ),
    ),
    Case(
        "cache: steered, then plain",
        ("no cache key",),
        ((Ask("longer", _ALL, cached=0),), (Ask("longer", cached=0),), (Ask("longer", _ALL, cached=2 * BLOCK),)),
    ),
    Case(
        "cache: completion shares the prompt with all",
        ("one key for all blocks",),
        (
            (Ask("longer", _COMPLETION, cached=0),),
            (Ask("longer", cached=2 * BLOCK),),
            (Ask("longer", clamp(SPACE, positions="completion"), cached=2 * BLOCK),),
        ),
    ),
    Case(
        "cache: a steered answer comes back as a prompt",
        ("no cache key",),
        (
            (Ask("long", _COMPLETION, tokens=16, cached=0),),
            (Ask("sea", after=0, cached=BLOCK), Ask("sea", _PROMPT, after=0, cached=0)),
            (Ask("sea", after=0), Ask("sea", _PROMPT, after=0)),
        ),
    ),
    Case(
        "cache: same program, other length of prompt",
        ("digest alone as the cache key",),
        ((Ask("long", _PROMPT, cached=0),), (Ask("sea", _PROMPT, after=0, cached=BLOCK),)),
    ),
)


def reading(features: list[int], **more: Any) -> dict[str, Any]:
    """A reading of features."""
    return {"sae": SAE, "features": features, **more}


def reads(*readings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A field ``steering`` that reads, and perhaps edits too."""
    return {"readings": list(readings), **more}


_READ_ALL = reading([SEA, TRAINS], top_k=3, positions="all")
READINGS = (
    Case(
        "read before the edits",
        ("f' read for f", "f read for f'"),
        ((Ask("sea", _ALL | reads(_READ_ALL, _READ_ALL | {"at": "after"})),),),
    ),
    Case(
        "read beside plain and steered requests",
        ("read of the next token",),
        (
            (
                Ask("sea", reads(reading([SEA, SPACE]))),
                Ask("sea"),
                Ask("garden", reads(reading([], top_k=5, positions="prompt", per_token=False))),
                Ask("piano", _COMPLETION | reads(reading([MUSIC, TRAINS], positions="all", at="after"))),
                Ask("piano", reads(reading([MUSIC], positions={"ranges": [[2, 5], [12, 14]]}, top_k=1))),
            ),
        ),
    ),
    Case(
        "read behind an edit at an earlier place",
        ("first place alone",),
        (
            (
                Ask(
                    "sea",
                    asked(
                        edit([MUSIC], "add", value=1.0),
                        vector("away", "resid_post.1", "add", value=0.5),
                        vector("away", "resid_mid.4", "clamp", value=10.0),
                        **reads(_READ_ALL),
                    ),
                ),
            ),
        ),
    ),
    Case(
        "read in two choices",
        ("positions of what is read off by one",),
        ((Ask("sea", _ALL | reads(_READ_ALL), choices=2),),),
    ),
    Case(
        "read a wide program",
        ("wide slots idle",),
        ((Ask("sea", reads(reading(FIRING), interventions=[edit([TRAINS], "clamp", value=40.0)])),),),
    ),
    Case(
        "read a prompt in chunks",
        ("readings of the last step alone",),
        ((Ask("longer", reads(_READ_ALL)), Ask("sea", reads(reading([SEA])))),),
    ),
    Case(
        "read through a preemption",
        ("positions of what is read off by one",),
        (
            (
                Ask("long", tokens=16),
                *(Ask("long", clamp(f) | reads(_READ_ALL), tokens=16) for f in (SPACE, MUSIC, SCHOOL)),
                Ask("long", reads(reading([SEA], positions="all")), tokens=16),
            ),
        ),
    ),
    Case(
        "flags",
        ("positions of what is read off by one",),
        (
            (
                Ask("sea", {"on": [{"sae": SAE, "feature": SEA, "above": 20.0, "action": "flag"}]}),
                Ask("sea", _ALL | {"on": [{"sae": SAE, "feature": TRAINS, "above": 5.0, "action": "flag"}]}),
            ),
        ),
    ),
    Case(
        "cache: what is read is computed",
        ("hit beyond what is read",),
        (
            (Ask("longer", cached=0),),
            (Ask("longer", reads(_READ_ALL), cached=0),),
            (
                Ask("longer", reads(reading([SEA])), cached=2 * BLOCK),
                Ask("longer", reads(reading([295], positions={"ranges": [[40, 50]]})), cached=BLOCK),
            ),
            (Ask("longer", _COMPLETION | reads(reading([SEA])), cached=2 * BLOCK), Ask("longer", cached=2 * BLOCK)),
        ),
    ),
)

CASES: tuple[Case, ...] = (
    Case("plain", ("neighbour's program",), ((Ask("sea"), Ask("garden", _ALL)),)),
    *OPERATIONS,
    *CALIBRATED,
    *POSITIONS,
    *BATCHES,
    *CACHE,
    *READINGS,
)


def write_calibrations(folder: Path) -> None:
    """The profiles that come with the package, and a calibration over features that fire."""
    shutil.copytree(embedded.PROFILES, folder)
    features = sorted({*FIRING, SEA, TRAINS, SPACE, MUSIC, SCHOOL, SNOW, FOOD})
    record = made_up(features, len(CONCEPTS), seed=1, bins=16, largest=24.0)
    density = record.log_density
    # What fires is mostly of the sea, or of music.
    density[:, :, 1:] = density[:, :, 1:] * 0.3 + torch.tensor([5.0, 0.0, 0.0, 2.5])[:, None]
    density -= density.logsumexp(dim=2, keepdim=True)
    order = [[feature, *(other for other in FIRING if other != feature)] for feature in (SEA, TRAINS, SPACE, MUSIC)]
    ranks = [[chosen.index(f) if f in chosen else -1 for chosen in order] for f in features]
    record = replace(record, rank=torch.tensor(ranks, dtype=torch.int32))
    entry = CatalogSae.make(SAE, open_sae(embedded.SAE))
    model = of_folder(embedded.FOLDER / "model")
    write_calibration(folder, CALIBRATION, entry, record, labels=CONCEPTS, model=model)


@dataclass(frozen=True)
class Files:
    """The files of the catalog that all paths share.

    Args:
        folder: Where the plain directions are.
    """

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> "Files":
        """Makes the plain directions, one along a feature and one that means nothing, and the profiles."""
        decoder = open_sae(embedded.SAE).rows([SEA]).dec[0]
        away = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(5))
        for name, values in {"sea": decoder * 2, "away": away}.items():
            save_file({"direction": values.contiguous()}, folder / f"{name}.safetensors")
        write_calibrations(folder / "profiles")
        return cls(folder)

    @property
    def profiles(self) -> Path:
        """The profiles that come with the package, and a calibration."""
        return self.folder / "profiles"

    @property
    def vectors(self) -> dict[str, Path]:
        """The plain directions by name."""
        return {name: self.folder / f"{name}.safetensors" for name in ("sea", "away")}

    def catalog(self) -> Catalog:
        """The catalog."""
        entry = CatalogSae.make(SAE, open_sae(embedded.SAE), whole=True)
        vectors = [Vector.load(*item) for item in self.vectors.items()]
        return Catalog([entry], vectors, self.profiles, model=of_folder(embedded.FOLDER / "model"))

    def plugin(self) -> dict[str, Any]:
        """The same as the configuration of the vLLM plugin."""
        return {
            "saes": [{"name": SAE, "location": str(embedded.SAE), "whole": True}],
            "vectors": [{"name": name, "location": str(path)} for name, path in self.vectors.items()],
            "sites": list(SITES),
            "profiles": str(self.profiles),
            "limits": {
                "max_programs": LIMITS.max_programs,
                "features": LIMITS.rows,
                "wide_programs": LIMITS.wide_programs,
                "wide_features": LIMITS.wide_rows,
            },
        }
