"""From a location to a family: local first, then the hub; what cannot be told is refused with what was looked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from sae_steer.errors import CheckpointError, UnsafeCheckpoint, UnsupportedCheckpoint
from sae_steer.sae import hub, open_sae, saelens
from sae_steer.sae.location import Location
from sae_steer.sae.open import FAMILIES
from sae_steer.sae.registry import Registry
from tests.sae_files import write_saelens


def test_local_folder_by_text_or_path(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    opened = open_sae(str(tmp_path))
    assert opened.path == tmp_path
    assert opened.fingerprint == open_sae(tmp_path, family="saelens").fingerprint


def test_a_local_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_saelens(tmp_path / "org" / "repo")
    assert open_sae("org/repo").spec.family == "saelens"


def test_no_family(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(UnsupportedCheckpoint, match=r"Looked for .*saelens: cfg.json and sae_weights.safetensors"):
        open_sae(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=r"no checkpoint family 'mystery'\. Families: .*saelens"):
        open_sae(tmp_path, family="mystery")
    with pytest.raises(CheckpointError, match=r"cfg\.json"):
        open_sae(tmp_path, family="saelens")


def test_a_folder_of_saes_names_them(tmp_path: Path) -> None:
    write_saelens(tmp_path / "layer_3")
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedCheckpoint, match="Name one: layer_3"):
        open_sae(tmp_path)


def test_a_pickle_is_called_one_before_an_unknown_folder(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeCheckpoint, match=r"ae\.pt is a pickle"):
        open_sae(tmp_path)


@pytest.mark.parametrize("location", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", Path("a/b")])
def test_a_missing_folder(location: str | Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder or file"):
        open_sae(location)


def test_the_weights_file_stands_for_its_folder(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    assert open_sae(tmp_path / "sae_weights.safetensors").fingerprint == open_sae(tmp_path).fingerprint
    with pytest.raises(CheckpointError, match=r"cfg\.json is no weights file.*\.safetensors"):
        open_sae(tmp_path / "cfg.json")
    with pytest.raises(CheckpointError, match="no revisions"):
        open_sae(tmp_path, revision="main")


def test_registry_refuses_a_second_family_of_a_name() -> None:
    registry = Registry()
    registry.add(saelens.FAMILY)
    with pytest.raises(ValueError, match="'saelens' is registered already"):
        registry.add(saelens.FAMILY)
    assert FAMILIES.named("saelens") is saelens.FAMILY


def test_two_families_that_both_recognise_a_folder(tmp_path: Path) -> None:
    write_saelens(tmp_path)
    registry = Registry()
    registry.add(saelens.FAMILY)
    registry.add(replace(saelens.FAMILY, name="twin"))
    with pytest.raises(UnsupportedCheckpoint, match="saelens and twin"):
        registry.sniff(Location(tmp_path))


@pytest.mark.parametrize(
    "location",
    ["name", "org/repo/../../etc", "org/repo//x", "org/repo/./x", "org/repo@", "a b/c", "org/repo/x@y z", ""],
)
def test_what_is_no_place_on_the_hub(location: str) -> None:
    with pytest.raises(CheckpointError, match="neither here nor a place"):
        hub.download(location)


@pytest.mark.parametrize(
    ("location", "argument", "repo", "parts", "revision"),
    [
        ("org/re.po-1", None, "org/re.po-1", (), None),
        ("org/repo@v2", None, "org/repo", (), "v2"),
        ("org/repo/layer_2/width_16k", None, "org/repo", ("layer_2", "width_16k"), None),
        ("org/repo/blocks.2.[x]/", "abc", "org/repo", ("blocks.2.[x]",), "abc"),
        ("org/repo/a@refs/pr/1", None, "org/repo", ("a",), "refs/pr/1"),
    ],
)
def test_download_fetches_one_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
    argument: str | None,
    repo: str,
    parts: tuple[str, ...],
    revision: str | None,
) -> None:
    folder = tmp_path.joinpath(*parts)
    write_saelens(folder)
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert open_sae(location, revision=argument).path == folder
    assert (asked["repo_id"], asked["revision"]) == (repo, revision)

    inside = "".join(part + "/" for part in parts)
    wanted = {f"{inside}cfg.json", f"{inside}sae_weights.safetensors", f"{inside}features.json"}
    others = {f"{inside}trainer.pt", f"{inside}deeper/cfg.json", "z/other/cfg.json", f"{inside}code.py"}
    fetched = filter_repo_objects(
        [*wanted, *others], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(fetched) == wanted


REPOSITORY = {
    "README.md",
    "config.json",
    "training.json",
    "a/layers.3/cfg.json",
    "a/layers.3/sae.safetensors",
    "a/layers.3/optimizer.pt",
    "a/layers.3/deeper/cfg.json",
    "a/config.json",
    "a/other.json",
    "a/layers.4/sae.safetensors",
    "pt/config.json",
    "pt/run/ae.pt",
    "pt/run/conf.yaml",
    "pt/run/ae_2.pt",
}


@pytest.mark.parametrize(
    ("location", "fetched"),
    [
        ("a/layers.3", {"a/layers.3/cfg.json", "a/layers.3/sae.safetensors", "a/config.json", "config.json"}),
        ("pt/run", {"pt/run/ae.pt", "pt/run/ae_2.pt", "pt/run/conf.yaml", "pt/config.json", "config.json"}),
        ("pt/run/ae_2.pt", {"pt/run/ae_2.pt", "pt/run/conf.yaml", "pt/config.json", "config.json"}),
    ],
)
def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, fetched: set[str]) -> None:
    def snapshot_download(
        repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        for name in filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert hub.download(f"org/repo/{location}") == tmp_path / location
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == fetched


def test_a_file_that_the_repository_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no file 'a/ae\.pt'"):
        hub.download("org/repo/a/ae.pt")


def test_one_revision_only() -> None:
    with pytest.raises(CheckpointError, match="Give one"):
        hub.download("org/repo@main", "v2")


def test_a_folder_that_the_repository_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds no weights \(.*in 'layer_9'"):
        hub.download("org/repo/layer_9")


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError])
def test_hub_errors_are_translated(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise kind("no way to the hub\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"could not be had.*no way to the hub Check the name"):
        open_sae("org/repo")


def test_the_hubs_errors_are_of_the_classes_that_are_caught() -> None:
    assert issubclass(HfHubHTTPError, OSError)


def test_really_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # conftest.py sets HF_HUB_OFFLINE: the real client, with nothing cached.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be had from the Hugging Face hub"):
        open_sae("sae-steer-tests/not-there/layer_0")
