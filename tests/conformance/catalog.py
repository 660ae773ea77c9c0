"""What all paths of :mod:`tests.conformance.test_conformance` serve: limits, prompts, and the files of one catalog.

All run the model that ships with the package, in float32, with the limits below, which are small on purpose: prompts
come in chunks, slots are waited for, and the key-value cache overflows.
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

CALIBRATION = "topics"
CONCEPTS = ("sea", "trains", "space", "music")


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
