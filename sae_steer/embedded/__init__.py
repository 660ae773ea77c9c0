"""The model that ships with the package, so that everything can be tried with no network: where its files are.

What it is, how it was trained and what its features mean: ``NOTICE.md`` and ``sae/concepts.json`` beside this file.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
SAE = FOLDER / "sae"
PROFILES = FOLDER / "profiles"
SAE_NAME = "embedded"
"""The name under which its profiles know its SAE."""
