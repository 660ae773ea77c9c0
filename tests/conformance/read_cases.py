"""The cases of what is read: before the edits and after them, at which positions, and beside whom."""

from tests.conformance.asks import Ask, Case, asked, clamp, edit, reading, reads, vector
from tests.conformance.catalog import BLOCK, FIRING, MUSIC, SAE, SCHOOL, SEA, SPACE, TRAINS

_ALL = clamp(TRAINS)
_COMPLETION = clamp(TRAINS, positions="completion")
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
