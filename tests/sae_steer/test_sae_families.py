"""Every family on its synthetic checkpoint: told by its files alone, and a clamp served as its own forward says."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sae_steer
from sae_steer.reference import encode, normalised
from sae_steer.sae import Activation, open_sae
from sae_steer.sae.convert import convert
from sae_steer.sae.files import FileSae
from sae_steer.sae.open import FAMILIES
from sae_steer.sites import Site
from sae_steer_cli.cli import app
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import HIDDEN, edit, steering, tiny_model
from tests.sae_writers.deepseek_r1 import write_deepseek_r1
from tests.sae_writers.dictionary_learning import write_dictionary_learning
from tests.sae_writers.gemma import write_scope, write_scope_2
from tests.sae_writers.goodfire import write_goodfire
from tests.sae_writers.layer_transcoders import write_layer_transcoder
from tests.sae_writers.openai_gpt2 import write_openai
from tests.sae_writers.openmoss import write_llama_scope, write_openmoss
from tests.sae_writers.prisma import write_prisma
from tests.sae_writers.qwen_scope import write_qwen_scope
from tests.sae_writers.sdxl_unbox import write_sdxl_unbox
from tests.sae_writers.sparsify import write_sparsify

IDS = torch.tensor([[1, 17, 33, 4, 9]])
SITE = "resid_post.1"


def canonical(folder: Path) -> None:
    write_saelens(folder / "source", d_in=HIDDEN)
    convert(open_sae(folder / "source"), folder / "made")


def into(write: Callable[..., object], **arguments: object) -> Callable[[Path], object]:
    return lambda folder: write(folder, d_in=HIDDEN, **arguments)


WRITERS: dict[str, Callable[[Path], object]] = {
    "canonical": canonical,
    "deepseek_r1": into(write_deepseek_r1),
    "dictionary_learning": into(write_dictionary_learning),
    "gemma_scope": into(write_scope),
    "gemma_scope_2": into(write_scope_2),
    "goodfire": into(write_goodfire),
    "layer_transcoders": into(write_layer_transcoder, d_out=HIDDEN),
    "llama_scope": into(write_llama_scope),
    "openai_gpt2": into(write_openai),
    "openmoss": into(write_openmoss),
    "prisma": into(write_prisma),
    "qwen_scope": into(write_qwen_scope),
    "saelens": into(write_saelens),
    "sdxl_unbox": into(write_sdxl_unbox),
    "sparsify": into(write_sparsify),
}
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


def place(folder: Path, family: str) -> Path:
    """The folder that holds the weights; of Llama Scope, the one above."""
    if family == "canonical":
        return folder / "made"
    file = next(file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES)
    return file.parent.parent if family == "llama_scope" else file.parent


def test_every_family_is_here() -> None:
    assert set(WRITERS) == set(FAMILIES.names())
    page = (Path(__file__).parents[2] / "docs" / "sae-families.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(WRITERS)


@pytest.mark.parametrize("family", WRITERS)
def test_inspect_tells_it(tmp_path: Path, family: str) -> None:
    WRITERS[family](tmp_path)
    done = CliRunner().invoke(app, ["inspect", str(place(tmp_path, family)), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["family"], found["d_in"], found["d_out"]) == (family, HIDDEN, HIDDEN)
    assert found["sample"]["decoder row norm"][2] > 0


@torch.no_grad()
@pytest.mark.parametrize("family", WRITERS)
def test_a_clamp_is_served_as_its_forward_says(tmp_path: Path, family: str) -> None:
    WRITERS[family](tmp_path)
    sae = open_sae(place(tmp_path, family))
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
