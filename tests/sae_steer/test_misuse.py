"""Ways of using the in-process interface and the files beside it that must not end in something other than asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import sae_steer
from sae_steer.errors import CheckpointError, Forbidden, Unsupported
from sae_steer.inprocess import Steer
from sae_steer.sae import open_sae
from sae_steer.schema import parse_profile
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import HIDDEN, tiny_model

PUSH = {"interventions": [{"site": "resid_post.0", "vector": "v", "op": "add", "value": 3.0}]}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def steer(model: PreTrainedModel) -> Iterator[Steer]:
    with sae_steer.attach(model, {}, vectors={"v": torch.ones(HIDDEN)}, sites=["resid_post.0"]) as attached:
        yield attached


@torch.no_grad()
def test_a_mask_given_by_position_counts(steer: Steer, model: PreTrainedModel) -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    tokens = []
    for args, kwargs in (((ids, mask), {}), ((), {"input_ids": ids, "attention_mask": mask})):
        with steer.rows([PUSH]) as rows:
            model(*args, **kwargs, use_cache=False)
        tokens.append(rows.reports()[0]["tokens"])
    assert tokens == [4, 4]


@torch.no_grad()
def test_the_model_inside_is_not_steered_in_silence(steer: Steer, model: PreTrainedModel) -> None:
    with pytest.raises(Unsupported, match="the model that was attached"), steer.rows([PUSH]):
        model.model(input_ids=torch.tensor([[1, 2]]))
    with steer.rows([PUSH]):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))  # breaks off: its layout must not serve another call
        with pytest.raises(Unsupported, match="the model that was attached"):
            model.model(input_ids=torch.tensor([[1, 2]]))
    model.model(input_ids=torch.tensor([[1, 2]]))  # outside it is nobody's business


def test_no_rows_are_refused(steer: Steer) -> None:
    with pytest.raises(Unsupported), steer.rows([]):
        pass


@torch.no_grad()
def test_reports_use_the_name_at_the_site(model: PreTrainedModel, tmp_path: Path) -> None:
    write_saelens(tmp_path, d_in=HIDDEN, n_features=8, hook_name="blocks.0.hook_resid_post")
    saes = {"first": open_sae(tmp_path), "again": open_sae(tmp_path)}
    edit = {"sae": "first", "features": [1], "op": "clamp", "value": 2.0}
    with sae_steer.attach(model, saes) as steer, steer.rows([{"interventions": [edit]}]) as rows:
        model(input_ids=torch.tensor([[1, 2]]))
    assert rows.reports()[0]["features"][0]["sae"] == "first"


def test_a_dictionary_changed_in_place_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a", d_in=HIDDEN, n_features=8, seed=1)
    write_saelens(tmp_path / "b", d_in=HIDDEN, n_features=8, seed=2)
    sae = open_sae(tmp_path / "a")
    before = sae.rows([3]).enc
    file = tmp_path / "a" / "sae_weights.safetensors"
    other = tmp_path / "b" / "sae_weights.safetensors"
    kept = tmp_path / "kept"
    file.rename(kept)
    other.rename(file)  # replaced by rename: the old file is still mapped, and still what was fingerprinted
    assert torch.equal(sae.rows([3]).enc, before)
    changed = open_sae(tmp_path / "a")
    file.write_bytes(kept.read_bytes())
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        changed.rows([3])


def test_a_profile_is_never_a_link(tmp_path: Path, model: PreTrainedModel) -> None:
    folder, elsewhere = tmp_path / "profiles", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    profile = parse_profile({"name": "calm", **PUSH})
    (elsewhere / "profile.json").write_text(profile.model_dump_json(exclude_defaults=True))
    (folder / "calm").symlink_to(elsewhere)
    (folder / "file").write_text("in the way")
    with sae_steer.attach(
        model, {}, vectors={"v": torch.ones(HIDDEN)}, sites=["resid_post.0"], profiles=folder
    ) as steer:
        assert steer.catalog.profile_names() == []
        for name in ("calm", "file"):
            with pytest.raises(Forbidden, match="cannot be changed"):
                steer.catalog.put_profile(profile.model_copy(update={"name": name}))
    assert list(elsewhere.iterdir()) == [elsewhere / "profile.json"]
