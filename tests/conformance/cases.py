"""The one list of cases that every path of :mod:`tests.conformance.test_conformance` must answer alike.

To add a case, add it to :data:`CASES`; that is all. A case is

- its requests, in waves: those of one wave are sent together, and a wave is sent when the one before it is answered;
- for each request a prompt of :data:`tests.conformance.catalog.PROMPTS`, and what it asks in the field ``steering``;
- the wrong variant that it ``kills``, a name of :mod:`tests.conformance.wrong`. If no variant there is what the case
  is for, write one: a few lines that make the running plugin wrong in that way. A test switches it on and wants the
  case to fail.

Then run ``pytest tests/conformance -k "Definition or Attach"``, which takes seconds. It demands of the definition
itself (float64) that each steered request fires, that it moves a token of the plain answer, that no choice of a token
is so close that float32 may decide it otherwise, and that no answer reaches the end of the sequence. Where it
complains, choose other features, values or prompts.
"""

from tests.conformance.asks import Ask, Case, by_calibration, clamp, edit, single, vector
from tests.conformance.catalog import (
    BLOCK,
    CALIBRATION,
    FIRING,
    FOOD,
    MUSIC,
    SAE,
    SCHOOL,
    SEA,
    SNOW,
    SPACE,
    STEP_TOKENS,
    TRAINS,
)
from tests.conformance.read_cases import READINGS

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

CASES: tuple[Case, ...] = (
    Case("plain", ("neighbour's program",), ((Ask("sea"), Ask("garden", _ALL)),)),
    *OPERATIONS,
    *CALIBRATED,
    *POSITIONS,
    *BATCHES,
    *CACHE,
    *READINGS,
)
