"""What the tests of the compiler share: a catalog with profiles, and documents that compile."""

import contextlib
from pathlib import Path

from hypothesis import strategies as st

from sae_steer.catalog import Catalog
from sae_steer.errors import RequestError
from sae_steer.program import Program
from sae_steer.schema import parse_profile
from tests.sae_steer.helpers import FEATURES, Json, compile_doc, edit, make_catalog, vector_edit

READ: Json = {"sae": "r1", "features": [3, 9]}
FLAG: Json = {"sae": "r1", "feature": 3, "above": 1.0, "action": "flag"}
GOOD: Json = {
    "saes": st.sampled_from(["r0", "r1", "r1b", "w1", "tc"]),
    "vectors": st.sampled_from(["v", "u"]),
    "sites": st.sampled_from(["resid_post.1", "resid_mid.1"]),
    "features": st.integers(0, FEATURES - 1),
    "calibrations": st.sampled_from([("cal", "rude"), ("cal", "sad"), ("cal0", "calm")]),
}


def profiled_catalog(root: Path) -> Catalog:
    """The catalog of :func:`make_catalog`, and profiles without calibrations."""
    catalog = make_catalog(root)
    r1 = catalog.sae("r1").sae.fingerprint
    for name, fields in {
        "calm": {"interventions": [edit(features=[3, 4], op="ablate", value=None)], "saes": {"r1": r1}},
        "also": {"interventions": [edit(features=[4])]},
        "other": {"interventions": [edit(sae="r1b")]},
        "stale": {"interventions": [edit()], "saes": {"r1": "sha256:0"}},
        "lost": {"interventions": [edit()], "saes": {"gone": "sha256:0"}},
        "prompted": {"interventions": [edit(features=[3], positions="prompt")]},
        "straight": {"interventions": [vector_edit()]},
    }.items():
        catalog.put_profile(parse_profile({"name": name, **fields}))
    return catalog


def digest(document: Json, catalog: Catalog) -> str:
    compiled = compile_doc(document, catalog)
    assert compiled is not None
    return compiled.digest


def without_later(document: Json) -> Json:
    return {key: value for key, value in document.items() if key not in ("profiles", "readings", "on")}


def compilable(document: Json, catalog: Catalog) -> tuple[Json, Program]:
    """The document with those interventions and fields left out that are refused; something always remains."""
    kept: Json = {"interventions": [edit()]}
    compiled = compile_doc(kept, catalog)
    rest = without_later(document)
    for one in rest.pop("interventions", []):
        with contextlib.suppress(RequestError):
            longer = kept | {"interventions": [*kept["interventions"], one]}
            compiled, kept = compile_doc(longer, catalog), longer
    for key, value in rest.items():
        with contextlib.suppress(RequestError):
            compiled, kept = compile_doc(kept | {key: value}, catalog), kept | {key: value}
    assert compiled is not None
    return kept, compiled
