"""Put the finished model, autoencoder and profiles into the package.

python package.py --out ~/embedded-run --to ../../sae_steer/embedded
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from files import write_json

from sae_steer.sae import open_sae

Part = tuple[str, str, float | None]
"""An operation, a concept and the clamp as a multiple of the reference (None: the measured one)."""

PROFILES: dict[str, tuple[str, list[Part]]] = {
    "seaside": (
        "Turns replies to the sea, mostly even when the question is about something else.",
        [("clamp", "sea", 0.8)],
    ),
    "stargazer": ("Turns open replies to space and stars.", [("clamp", "space", None)]),
    "grumpy": ("Mixes anger into the reply, whatever it is about.", [("clamp", "angry", None)]),
    "no-trains": ("Keeps replies away from trains, even when asked about them.", [("ablate", "trains", None)]),
    "boats-not-trains": (
        "Two at once: takes trains out and puts the sea in.",
        [("ablate", "trains", None), ("clamp", "sea", None)],
    ),
}
LIMIT = 11_000_000


def intervention(op: str, concept: dict[str, Any], multiple: float | None) -> dict[str, Any]:
    """One entry of a profile, with the features that were measured."""
    if op == "ablate":
        return {"sae": "embedded", "features": concept["ablate"]["features"], "op": "ablate"}
    clamp = concept["clamp"]
    value = clamp["value"] * (multiple or clamp["multiple_of_reference"]) / clamp["multiple_of_reference"]
    return {
        "sae": "embedded",
        "features": [concept["feature"]],
        "op": "clamp",
        "value": round(value, 2),
        "units": "raw",
    }


def profile(name: str, concepts: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """The profile `name` of the table above, tied to the autoencoder it was made for."""
    description, parts = PROFILES[name]
    interventions = [intervention(op, concepts[concept], multiple) for op, concept, multiple in parts]
    return {
        "name": name,
        "description": description,
        "interventions": interventions,
        "saes": {"embedded": fingerprint},
    }


def main() -> None:
    """Copy the files, write the profiles and check the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path.home() / "embedded-run", help="folder of the other scripts")
    parser.add_argument("--to", type=Path, required=True, help="folder that ships with the package")
    args = parser.parse_args()

    for part in ("model", "sae"):
        shutil.rmtree(args.to / part, ignore_errors=True)
        shutil.copytree(args.out / part, args.to / part, copy_function=shutil.copyfile)
    concepts = json.loads((args.to / "sae" / "concepts.json").read_text())["concepts"]
    fingerprint = open_sae(args.to / "sae").fingerprint
    for name in PROFILES:
        write_json(args.to / "profiles" / name / "profile.json", profile(name, concepts, fingerprint))
    size = sum(path.stat().st_size for path in args.to.rglob("*") if path.is_file())
    print(f"{size:,} bytes")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT:,} bytes")


if __name__ == "__main__":
    main()
