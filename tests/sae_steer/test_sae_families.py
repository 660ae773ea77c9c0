"""Every family on its synthetic checkpoint: told by its files alone, and a clamp served as its own forward says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sae_steer
from sae_steer.reference import encode, normalised
from sae_steer.sae import Activation, open_sae
from sae_steer.sae.files import FileSae
from sae_steer.sae.open import FAMILIES
from sae_steer.sites import Site
from sae_steer_cli.cli import app
from tests.sae_steer.helpers import HIDDEN, edit, steering, tiny_model
from tests.sae_writers.every import WRITERS, written

IDS = torch.tensor([[1, 17, 33, 4, 9]])
SITE = "resid_post.1"


def test_every_family_is_here() -> None:
    assert set(WRITERS) == set(FAMILIES.names())
    page = (Path(__file__).parents[2] / "docs" / "sae-families.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(WRITERS)


@pytest.mark.parametrize("family", WRITERS)
def test_inspect_tells_it(tmp_path: Path, family: str) -> None:
    done = CliRunner().invoke(app, ["inspect", str(written(tmp_path, family, HIDDEN)), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["family"], found["d_in"], found["d_out"]) == (family, HIDDEN, HIDDEN)
    assert found["sample"]["decoder row norm"][2] > 0


@torch.no_grad()
@pytest.mark.parametrize("family", WRITERS)
def test_a_clamp_is_served_as_its_forward_says(tmp_path: Path, family: str) -> None:
    sae = open_sae(written(tmp_path, family, HIDDEN))
    assert isinstance(sae, FileSae)
    sae = replace(sae, spec=replace(sae.spec, site=Site.parse(SITE)))
    model = tiny_model()
    x = model(input_ids=IDS, output_hidden_states=True).hidden_states[2][0].double()
    f = torch.stack([encode(sae, token) for token in x])
    feature, value = int(f.mean(dim=0).argmax()), float(f.max()) + 1
    scale = torch.tensor([normalised(sae, token)[1] for token in x])[:, None]
    dictionary = sae.dictionary()["W_dec"][feature]
    if sae.spec.value_convention == "decoder_norm":
        dictionary = dictionary / dictionary.norm()
    whole = ["s"] if sae.spec.activation is Activation.TOPK else []
    request = steering(edit(sae="s", features=[feature], op="clamp", value=value, positions="all"))
    with sae_steer.attach(model, saes={"s": sae}, whole=whole) as steer, steer.rows([request]):
        edited = model(input_ids=IDS, output_hidden_states=True).hidden_states[2][0].double()
    delta = (value - f[:, feature])[:, None] * scale * dictionary
    torch.testing.assert_close(edited - x, delta, rtol=1e-4, atol=1e-4 * float(delta.abs().max()))
