"""Names: profiles in their folder, vectors, and what two things of one name are."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_steer import catalog as catalog_module
from sae_steer.catalog import Catalog, CatalogSae, ProfileStore, Vector
from sae_steer.errors import CheckpointError, Forbidden, SchemaError, StartError, UnknownName
from sae_steer.sae import open_sae
from sae_steer.schema import Profile, parse_profile
from sae_steer.sites import Site
from tests.sae_files import write_labels, write_saelens
from tests.sae_steer.helpers import Json, edit, interventions, names, vector_edit


def profile(name: str = "calm", *edits: Json, **fields: object) -> Profile:
    return parse_profile({"name": name, "interventions": list(edits) or [edit()], **fields})


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "profile.json").write_text(text, encoding="utf-8")


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "profiles")


def folder_of(store: ProfileStore) -> Path:
    assert store.folder is not None
    return store.folder


# ------------------------------------------------------------------------------------------- profiles


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names, st.lists(interventions(), min_size=1, max_size=3), st.text(st.characters(codec="utf-8"), max_size=20))
def test_what_is_stored_comes_back(store: ProfileStore, name: str, edits: list[Json], description: str) -> None:
    stored = profile(name, *edits, description=description, saes={"r1": "sha256:1"})
    store.put(stored)
    assert store.get(name) == stored
    assert ProfileStore(store.folder).get(name) == stored
    assert name in store.names()


def test_profiles_are_listed_by_name_and_go_away(store: ProfileStore) -> None:
    assert store.names() == []
    for name in ("b", "a", "c.d-e_f"):
        store.put(profile(name))
    assert store.names() == ["a", "b", "c.d-e_f"]
    store.delete("b")
    assert store.names() == ["a", "c.d-e_f"]
    assert not (folder_of(store) / "b").exists()
    with pytest.raises(UnknownName):
        store.get("b")
    with pytest.raises(UnknownName):
        store.delete("b")


def test_a_profile_is_replaced_as_a_whole_or_not_at_all(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(profile(description="old"))

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Forbidden, match="calm"):
        store.put(profile(description="new"))
    monkeypatch.undo()
    assert store.get("calm").description == "old"
    assert [path.name for path in (folder_of(store) / "calm").iterdir()] == ["profile.json"]


def test_a_reader_never_sees_half_a_profile(store: ProfileStore) -> None:
    long = [profile(description=letter * 4000) for letter in "ab"]
    store.put(long[0])
    stop = threading.Event()

    def replace() -> None:
        for turn in range(40):
            store.put(long[turn % 2])
        stop.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    while not stop.is_set():
        seen.add(ProfileStore(store.folder).get("calm").description)
    writer.join()
    assert seen <= {"a" * 4000, "b" * 4000}
    assert seen


def test_another_process_replaces_a_profile(store: ProfileStore) -> None:
    store.put(profile(description="mine"))
    assert store.get("calm").description == "mine"
    ProfileStore(store.folder).put(profile(description="ours"))  # as long as before
    assert store.get("calm").description == "ours"
    ProfileStore(store.folder).delete("calm")
    with pytest.raises(UnknownName):
        store.get("calm")


def test_a_profile_edited_in_place_is_read_again(store: ProfileStore) -> None:
    store.put(profile(description="before"))
    store.get("calm")
    write(folder_of(store), "calm", json.dumps({"name": "calm", "interventions": [edit()], "description": "later"}))
    assert store.get("calm").description == "later"


def test_an_unchanged_profile_is_not_parsed_again(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(profile())
    first = store.get("calm")
    monkeypatch.setattr(catalog_module, "parse_profile", None)
    assert store.get("calm") is first


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret", "/etc", "calm/../calm", "calm/", "Calm", "calm\n", "a\x00"]
)
def test_names_never_become_paths(name: str, tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "profiles")
    store.put(profile())
    write(tmp_path, "secret", json.dumps({"name": "secret", "interventions": [edit()]}))
    write(tmp_path, "profiles/..", json.dumps({"name": "up", "interventions": [edit()]}))
    with pytest.raises(UnknownName) as caught:
        store.get(name)
    assert caught.value.code == "unknown_profile"
    with pytest.raises(UnknownName):
        store.delete(name)
    assert (tmp_path / "secret" / "profile.json").is_file()
    assert store.names() == ["calm"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"name": "odd"}',
        '{"name": "odd", "interventions": []}',
        '{"name": "other", "interventions": [{"op": "ablate", "sae": "r1", "features": [1]}]}',
        '{"name": "odd", "name": "odd", "interventions": [{"op": "ablate", "sae": "r1", "features": [1]}]}',
        '{"name": "odd", "interventions": [{"op": "clamp", "sae": "r1", "features": [1], "value": NaN}]}',
        " " * (4 * 2**20 + 1),
    ],
    ids=["empty", "cut", "list", "null", "no edits", "empty edits", "other name", "key twice", "nan", "huge"],
)
def test_a_broken_profile_is_an_error_of_its_own(text: str, store: ProfileStore) -> None:
    store.put(profile("good"))
    write(folder_of(store), "odd", text)
    with pytest.raises(SchemaError):
        store.get("odd")
    assert store.names() == ["good", "odd"]
    assert store.get("good").name == "good"
    store.put(profile("odd"))
    assert store.get("odd").name == "odd"


def test_a_broken_profile_can_be_deleted(store: ProfileStore) -> None:
    write(folder_of(store), "odd", "{")
    store.delete("odd")
    assert store.names() == []


def test_a_profile_that_turns_bad_is_not_served_from_memory(store: ProfileStore) -> None:
    store.put(profile())
    store.get("calm")
    write(folder_of(store), "calm", "{")
    with pytest.raises(SchemaError):
        store.get("calm")


def test_other_things_in_the_folder_are_not_profiles(store: ProfileStore) -> None:
    folder = folder_of(store)
    (folder / "empty").mkdir(parents=True)
    (folder / "profile.json").write_text("{}")
    (folder / "odd" / "profile.json").mkdir(parents=True)
    assert store.names() == []


def test_without_a_folder_there_are_no_profiles() -> None:
    store = ProfileStore(None)
    assert store.names() == []
    with pytest.raises(UnknownName):
        store.get("calm")
    with pytest.raises(Forbidden):
        store.put(profile())


def test_a_folder_that_is_only_read(store: ProfileStore) -> None:
    store.put(profile())
    reader = ProfileStore(store.folder, writable=False)
    assert reader.get("calm") == profile()
    with pytest.raises(Forbidden):
        reader.put(profile("new"))
    with pytest.raises(Forbidden):
        reader.delete("calm")
    assert store.names() == ["calm"]


# ------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(4),
        torch.ones(0),
        torch.ones(()),
        torch.ones(2, 4),
        torch.ones(1, 4),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, float("inf")]),
        torch.tensor([1e300, 1.0], dtype=torch.float64),
        torch.tensor([1e-300, 0.0], dtype=torch.float64),
    ],
    ids=["zero", "empty", "number", "table", "one row", "nan", "inf", "too large", "too small"],
)
def test_vectors_that_are_not_directions(values: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="'odd'"):
        Vector.make("odd", values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_vector_is_known_by_its_content(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -2.5, 0.25])
    one, same = Vector.make("one", values), Vector.make("two", values.to(dtype))
    assert one.fingerprint == same.fingerprint
    assert torch.equal(same.values, values)
    assert Vector.make("one", -values).fingerprint != one.fingerprint
    assert Vector.make("one", torch.tensor([1.0, -2.5])).fingerprint != one.fingerprint


def test_a_vector_does_not_change_with_the_tensor_it_was_made_of() -> None:
    values = torch.ones(3)
    vector = Vector.make("v", values)
    values.zero_()
    assert torch.equal(vector.values, torch.ones(3))


def test_vectors_come_from_files_of_one_tensor(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"direction": torch.arange(3.0)}, path)
    assert torch.equal(Vector.load("v", path).values, torch.arange(3.0))
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="holds 2 tensors"):
        Vector.load("v", path)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="holds 0 tensors"):
        Vector.load("v", path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="not a readable"):
        Vector.load("v", path)
    with pytest.raises(CheckpointError, match="not a readable"):
        Vector.load("v", tmp_path / "gone.safetensors")


# ------------------------------------------------------------------------------------------- names


def test_two_things_of_one_kind_need_two_names(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    entry, vector = CatalogSae.make("a", open_sae(tmp_path)), Vector.make("a", torch.ones(4))
    with pytest.raises(StartError, match="Two SAEs are called 'a'"):
        Catalog([entry, entry])
    with pytest.raises(StartError, match="Two vectors are called 'a'"):
        Catalog([], [vector, vector])
    both = Catalog([entry], [vector])
    assert both.sae("a") is entry
    assert both.vector("a") is vector


def test_unknown_names_tell_the_known_ones(tmp_path: Path) -> None:
    write_saelens(tmp_path / "sae")
    catalog = Catalog(
        [CatalogSae.make("res", open_sae(tmp_path / "sae"))], [Vector.make("up", torch.ones(4))], tmp_path / "profiles"
    )
    catalog.put_profile(profile("calm", vector_edit()))
    for look, code, known in (
        (catalog.sae, "unknown_sae", "res"),
        (catalog.vector, "unknown_vector", "up"),
        (catalog.profile, "unknown_profile", "calm"),
    ):
        with pytest.raises(UnknownName, match=known) as caught:
            look("gone")
        assert caught.value.code == code
    assert catalog.profile_names() == ["calm"]
    catalog.delete_profile("calm")
    assert catalog.profile_names() == []


def test_an_sae_without_a_site_needs_one(tmp_path: Path) -> None:
    write_saelens(tmp_path, hook_name="blocks.1.hook_unheard_of")
    sae = open_sae(tmp_path)
    with pytest.raises(StartError, match="do not say where"):
        CatalogSae.make("odd", sae)
    assert CatalogSae.make("odd", sae, site=Site.parse("resid_pre.1")).site == Site.parse("resid_pre.1")


def test_labels_are_searched_by_sae(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a")
    write_saelens(tmp_path / "b")
    write_labels(tmp_path / "a", {3: ("A Cat", 1.0), 9: ("a dog", None), 12: ("cats", 2.0)})
    catalog = Catalog([CatalogSae.make(name, open_sae(tmp_path / name)) for name in "ab"])
    found = catalog.search_features("a", "cat", 10)
    assert [entry.feature for _, entry in found] == [12, 3], "what begins with it first"
    assert [entry.feature for _, entry in catalog.search_features("a", "cat", 1)] == [12]
    assert catalog.search_features("b", "cat", 10) == []
    with pytest.raises(UnknownName):
        catalog.search_features("c", "cat", 10)
