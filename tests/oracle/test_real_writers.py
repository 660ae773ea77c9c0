"""SAEs that the real libraries wrote, read here: the same activations and the same decoding (``make oracle``)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_steer.errors import UnsupportedCheckpoint
from sae_steer.reference import encode
from sae_steer.sae import Sae, open_sae
from tests.sae_forward import assert_forward

VARIABLE = "SAE_STEER_ORACLE"
ROOT = Path(os.environ.get(VARIABLE, "nowhere"))
CASES = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("oracle.safetensors"))
REFUSED = {"sparsify-groupmax/layers.2": "activation is 'groupmax'"}

pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set; `make oracle` sets it")


def _open(case: str) -> Sae:
    # Beside the weights lies what the library computes with them: the weights are named.
    files = [path for path in (ROOT / case).iterdir() if path.suffix in (".safetensors", ".pt")]
    return open_sae(next(path for path in files if path.name != "oracle.safetensors"))


def test_every_library_wrote_something() -> None:
    assert {case.split("-")[0] for case in CASES} == {"sae", "sparsify", "dictionary_learning"}
    assert REFUSED.keys() <= set(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_the_same_numbers(case: str) -> None:
    sae, expected = _open(case), load_file(ROOT / case / "oracle.safetensors")
    assert sae.spec.family == case.split("-")[0].replace("sae", "saelens")
    assert sae.spec.site is not None
    assert_forward(sae, expected["x"], expected["f"], expected["y"])


def test_known_disagreements_with_sae_lens() -> None:
    # Both are read above as the libraries that wrote them compute them. Once sae-lens does too, this test goes.
    found = json.loads((ROOT / "sae_lens.json").read_text())
    assert found["sparsify"] != "loaded", "its num_latents of 0 is taken at its word, and W_dec turned round"
    assert found["scaling"] == "left out", "load_from_disk does not fold the factor of expected_average_only_in"


def test_an_unknown_class_is_refused_where_sae_lens_takes_it_for_relu() -> None:
    found = json.loads((ROOT / "sae_lens.json").read_text())
    assert found["unknown dict_class"] == "standard, without threshold"
    with pytest.raises(UnsupportedCheckpoint, match="ClassOfTomorrow"):
        open_sae(ROOT / "unknown_class" / "sae")


def test_llama_scope_counts_the_decoder_norms_that_sae_lens_leaves_out() -> None:
    found = json.loads((ROOT / "sae_lens.json").read_text())
    assert found["llama scope"] == "decoder norms left out"
    sae, expected = open_sae(ROOT / "llama_scope" / "sae"), load_file(ROOT / "llama_scope" / "gates.safetensors")
    gates = torch.stack([encode(sae, token) > 0 for token in expected["x"]])
    assert torch.equal(gates, expected["gate"])


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=REFUSED[case]):
        _open(case)
