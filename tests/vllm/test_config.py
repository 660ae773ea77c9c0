"""The plugin's configuration: closed and strict, told apart by its digest, and silent about what is secret."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_steer.errors import CheckpointError, SiteError, StartError
from sae_steer.limits import Limits
from sae_steer.sites import Site
from sae_steer_cli.vllm_args import argument
from sae_steer_vllm.config import KEY, PluginConfig, catalog_of, config_of, digest_of, read_file
from sae_steer_vllm.offline import additional_config
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import Json, edit
from tests.sae_writers.gemma import write_scope


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    write_saelens(tmp_path / "sae")
    return tmp_path / "sae"


def written(folder: Path, value: Any) -> Path:
    path = folder / "steer.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def refused(value: Any, where: str = "") -> str:
    with pytest.raises(StartError) as caught:
        config_of({KEY: value})
    assert where in caught.value.message
    return caught.value.message


# ------------------------------------------------------------------------------------------- there or not


@pytest.mark.parametrize("additional", [None, {}, {"theirs": 1}, {KEY: None}, "x", [], 5])
def test_an_engine_that_does_not_name_the_plugin_has_none(additional: object) -> None:
    assert config_of(additional) is None


def test_an_empty_object_is_a_configuration() -> None:
    config = config_of({KEY: {}})
    assert config == PluginConfig()
    assert config is not None
    assert config.limits.limits() == Limits()
    assert config.extra_sites() == []
    catalog = catalog_of(config)
    assert not catalog.saes
    assert not catalog.vectors


def test_a_compressed_sae_is_converted_once(tmp_path: Path) -> None:
    path = write_scope(tmp_path / "scope", compressed=True)
    (tmp_path / "cache").mkdir()
    entry = {"name": "scope", "location": str(path), "site": "resid_post.1"}
    with pytest.raises(StartError, match="sae-steer convert"):
        catalog_of(PluginConfig.model_validate({"saes": [entry]}))
    config = PluginConfig.model_validate({"saes": [entry], "convert_cache": str(tmp_path / "cache")})
    assert catalog_of(config).sae("scope").sae.spec.family == "canonical"
    with pytest.raises(StartError, match="a threshold was asked for"):
        catalog_of(
            PluginConfig.model_validate(
                {
                    "saes": [entry | {"location": str(path.parent), "topk": "threshold"}],
                    "convert_cache": str(tmp_path / "cache"),
                }
            )
        )


def test_everything_that_can_be_said(sae: Path, tmp_path: Path) -> None:
    save_file({"d": torch.ones(16)}, tmp_path / "v.safetensors")
    profiles = tmp_path / "profiles" / "mild"
    profiles.mkdir(parents=True)
    (profiles / "profile.json").write_text(json.dumps({"name": "mild", "interventions": [edit()]}))
    config = config_of(
        {
            "theirs": 1,
            KEY: {
                "saes": [
                    {"name": "one", "location": str(sae)},
                    {"name": "two", "location": str(sae), "site": "resid_pre.1", "whole": True},
                ],
                "vectors": [{"name": "v", "location": str(tmp_path / "v.safetensors")}],
                "sites": ["resid_mid.0", "mlp_in.5->mlp_out.5"],
                "profiles": str(tmp_path / "profiles"),
                "limits": {
                    "max_programs": 5,
                    "features": 6,
                    "wide_programs": 7,
                    "wide_features": 8,
                    "max_edits": 9,
                    "dose_limit": 0.5,
                },
                "allow_untested_vllm": True,
                "max_body_bytes": 4096,
            },
        }
    )
    assert config is not None
    assert config.limits.limits() == Limits(5, 6, 7, 8, 9, 0.5)
    assert config.extra_sites() == [Site.parse("resid_mid.0"), Site.parse("mlp_in.5->mlp_out.5")]
    assert config.allow_untested_vllm
    assert config.max_body_bytes == 4096
    catalog = catalog_of(config)
    assert {name: (str(entry.site), entry.whole) for name, entry in catalog.saes.items()} == {
        "one": ("resid_post.2", False),
        "two": ("resid_pre.1", True),
    }
    assert list(catalog.vectors) == ["v"]
    assert catalog.profile_names() == ["mild"]
    assert catalog_of(config) is catalog  # opened once
    assert PluginConfig.model_validate_json(config.model_dump_json()) == config


# ------------------------------------------------------------------------------------------- closed and strict

ENTRY: Json = {"name": "a", "location": "there"}
WRONG: list[tuple[Any, str]] = [
    ("{}", "is not an object"),
    ([], "is not an object"),
    (5, "is not an object"),
    (True, "is not an object"),
    ({"sae": []}, f"additional_config.{KEY}: sae: "),
    ({"saes": {}}, "saes: "),
    ({"saes": [[]]}, "saes.0"),
    ({"saes": [{"name": "a"}]}, "saes.0.location: "),
    ({"saes": [ENTRY | {"extra": 1}]}, "saes.0.extra: "),
    ({"saes": [ENTRY | {"name": "../a"}]}, "saes.0.name: "),
    ({"saes": [ENTRY | {"name": ""}]}, "saes.0.name: "),
    ({"saes": [ENTRY | {"location": ""}]}, "saes.0.location: "),
    ({"saes": [ENTRY | {"whole": 1}]}, "saes.0.whole: "),
    ({"saes": [ENTRY | {"whole": "true"}]}, "saes.0.whole: "),
    ({"saes": [ENTRY | {"site": 3}]}, "saes.0.site: "),
    ({"vectors": [ENTRY | {"site": "resid_post.1"}]}, "vectors.0.site: "),
    ({"sites": "resid_post.1"}, "sites: "),
    ({"sites": ["resid_post"]}, "sites: 'resid_post' is not a place"),
    ({"sites": ["resid_post.1", "resid_post.01"]}, "sites: 'resid_post.01' is not a place"),
    ({"profiles": []}, "profiles: "),
    ({"limits": {"features": 0}}, "limits.features: "),
    ({"limits": {"features": 4.0}}, "limits.features: "),
    ({"limits": {"features": True}}, "limits.features: "),
    ({"limits": {"max_programs": 10**9}}, "limits.max_programs: "),
    ({"limits": {"rows": 4}}, "limits.rows: "),
    ({"limits": {"dose_limit": 0}}, "limits.dose_limit: "),
    ({"limits": {"dose_limit": math.nan}}, "limits.dose_limit: "),
    ({"limits": {"dose_limit": 1e300}}, "limits.dose_limit: "),
    ({"limits": {"features": 512}}, "Wide programs must be wider"),
    ({"allow_untested_vllm": "yes"}, "allow_untested_vllm: "),
    ({"max_body_bytes": 1}, "max_body_bytes: "),
    ({"file": 5, "digest": "x"}, '"digest", and nothing else'),
    ({"file": "x"}, '"digest", and nothing else'),
    ({"file": "x", "digest": "y", "saes": []}, '"digest", and nothing else'),
    ({"file": "/nowhere/at/all.json", "digest": "x"}, "cannot be read: No such file"),
    ({"file": "/", "digest": "x"}, "cannot be read"),
    ({"file": "a\0b", "digest": "x"}, "cannot be read"),
]


@pytest.mark.parametrize(("value", "where"), WRONG, ids=lambda v: ascii(v)[:40])
def test_mistakes_are_refused_by_name(value: Any, where: str) -> None:
    refused(value, where)


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["saes", "limits", "file", "digest", "name", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_nothing_but_a_refusal_is_ever_raised(value: Any) -> None:
    try:
        found = config_of({KEY: value})
    except StartError as error:
        found = None
        error.message.encode()
    assert found is None or isinstance(found, PluginConfig)


def test_two_of_one_name(sae: Path, tmp_path: Path) -> None:
    entry = {"name": "one", "location": str(sae)}
    config = config_of({KEY: {"saes": [entry, entry | {"site": "resid_pre.1"}]}})
    assert config is not None
    with pytest.raises(StartError, match="Two SAEs are called 'one'"):
        catalog_of(config)
    save_file({"d": torch.ones(16)}, tmp_path / "v.safetensors")
    vector = {"name": "v", "location": str(tmp_path / "v.safetensors")}
    config = config_of({KEY: {"vectors": [vector, vector]}})
    assert config is not None
    with pytest.raises(StartError, match="Two vectors are called 'v'"):
        catalog_of(config)


def test_what_is_named_must_be_there(sae: Path, tmp_path: Path) -> None:
    broken: list[tuple[Json, type[StartError], str]] = [
        ({"saes": [{"name": "a", "location": str(tmp_path / "none")}]}, StartError, "none"),
        ({"saes": [{"name": "a", "location": str(sae), "site": "nowhere"}]}, SiteError, "nowhere"),
        ({"vectors": [{"name": "v", "location": str(tmp_path / "none")}]}, CheckpointError, "none"),
        ({"profiles": str(tmp_path / "none")}, StartError, "is not a folder"),
    ]
    for value, error, message in broken:
        config = config_of({KEY: value})
        assert config is not None
        with pytest.raises(error, match=message):
            catalog_of(config)


# ------------------------------------------------------------------------------------------- in a file


def test_a_file_is_named_with_its_digest(tmp_path: Path) -> None:
    path = written(tmp_path, {"limits": {"features": 3}})
    config, digest = read_file(path)
    assert digest == digest_of(path.read_bytes())
    assert config_of({KEY: {"file": str(path), "digest": digest}}) == config
    assert config.limits.features == 3
    path.write_text(path.read_text() + "\n")
    message = refused({"file": str(path), "digest": digest}, "is not the one that was named")
    assert digest in message
    assert digest_of(path.read_bytes()) in message
    assert "vllm-args" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"limits": {"features": 3, "features": 4}}', "appears twice"),
        ('{"limits": {"dose_limit": Infinity}}', "must be finite"),
        ("[]", "steer.json"),
        ("null", "steer.json"),
        ('{"files": []}', "files: "),
        ('{"file": "other.json", "digest": "x"}', "file: "),
    ],
)
def test_what_a_file_may_hold(content: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(StartError, match=message):
        read_file(path)
    refused({"file": str(path), "digest": digest_of(content.encode())}, str(path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "steer.json"
    path.write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(StartError, match="is not JSON"):
        read_file(path)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("make", [lambda path, _: additional_config(path), lambda path, i: argument(path, inline=i)])
def test_what_is_printed_is_read_back(make: Callable[[Path, bool], Json], inline: bool, tmp_path: Path) -> None:
    """What the command prints, and what the offline helper makes, through vLLM's own parsing of a JSON argument."""
    path = written(tmp_path, {"limits": {"features": 3, "dose_limit": 0.1}, "sites": ["resid_post.0"]})
    found = config_of(json.loads(json.dumps(make(path, inline))))
    assert found == read_file(path)[0]


def test_an_object_is_a_configuration_too() -> None:
    value = {"limits": {"features": 3}, "sites": ["resid_post.0"]}
    assert config_of(json.loads(json.dumps(additional_config(value)))) == PluginConfig.model_validate(value)


# ------------------------------------------------------------------------------------------- secrets


def test_what_is_secret_is_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM prints its configuration; a key that is put there is refused, and not told again."""
    secret = "sesame-open-1234"
    monkeypatch.setenv("SAE_STEER_ADMIN_KEY", secret)
    assert secret not in repr(PluginConfig())
    assert "admin_key" not in PluginConfig.model_fields
    for value in (
        {"admin_key": secret},
        {"limits": secret},
        {"limits": {"features": secret}},
        {"saes": [{"name": secret + "/", "location": "x"}]},
        {"saes": [{"name": "a", "location": "x", "token": secret}]},
        secret,
        {"file": 5, "digest": secret},
    ):
        assert secret not in refused(value)
    for content in (f'{{"admin_key": "{secret}"}}', f'{{"{secret[:3]}": "{secret}', secret):
        path = written(tmp_path, content)
        with pytest.raises(StartError) as caught:
            read_file(path)
        assert secret not in caught.value.message


def test_labels_are_given_with_an_sae(sae: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("feature,label\n1,the sea\n")
    entry = {"name": "a", "location": str(sae), "labels": str(tmp_path / "labels.csv")}
    config = config_of({KEY: {"saes": [entry]}})
    assert config is not None
    assert [found.label for _, found in catalog_of(config).search_features("a", "sea", 5)] == ["the sea"]
    (tmp_path / "broken.csv").write_text("feature,label\n1,a\n1,b\n")
    config = config_of({KEY: {"saes": [entry | {"labels": str(tmp_path / "broken.csv")}]}})
    assert config is not None
    with pytest.raises(StartError, match="line 3: feature 1 is here for the second time"):
        catalog_of(config)
