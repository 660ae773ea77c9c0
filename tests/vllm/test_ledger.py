"""The ledger is true: of the code, and of the vLLM that is installed."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import vllm
from packaging.specifiers import SpecifierSet
from vllm.config import VllmConfig

from sae_steer.errors import StartError
from sae_steer_vllm import compat
from sae_steer_vllm.compat import install, scheduler, versions
from sae_steer_vllm.ledger import LEDGER, Symbol

ROOT = Path(__file__).resolve().parents[2]
WRAPPED = install.WRAPPERS


def _find(where: str) -> Any:
    module, _, name = where.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})  # one without a default is no attribute of its class
        found = fields[part] if part in fields else getattr(found, part)
    return found


@pytest.mark.parametrize("symbol", LEDGER, ids=lambda symbol: symbol.where)
def test_what_the_ledger_names_is_there(symbol: Symbol) -> None:
    assert _find(symbol.where) is not None
    assert symbol.why


def test_the_ledger_names_what_is_wrapped_and_what_is_imported_and_nothing_else() -> None:
    files = Path(compat.__file__).parent.glob("*.py")
    imported = {
        f"{node.module}:{alias.name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    }
    attributes = {"vllm.config:CompilationConfig.static_forward_context"}
    named = [symbol.where for symbol in LEDGER]
    assert len(set(named)) == len(named)
    assert set(named) == set(WRAPPED) | imported | attributes


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("where", WRAPPED)
def test_a_wrapper_takes_what_the_wrapped_takes(where: str) -> None:
    # By name too: vLLM may call with keywords where it did not before.
    _, *mine = _parameters(WRAPPED[where])
    theirs = _parameters(_find(where))
    named = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert named == [p.name for p in theirs[: len(named)]]
    if not any(p.kind is p.VAR_KEYWORD for p in mine):
        assert len(named) == len(theirs)


def _config(**plugin: Any) -> VllmConfig:
    return VllmConfig(additional_config={"sae_steer": plugin})


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "0.33.0.dev7+g1234567.cpu", "1.0", "dev"])
def test_an_untested_version_is_refused_with_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(StartError, match=r"0\.26 to 0\.32.*allow_untested_vllm") as caught:
        versions.configured(_config())
    assert version in str(caught.value)
    assert versions.configured(_config(allow_untested_vllm=True)) is not None
    assert versions.configured(VllmConfig()) is None


@pytest.mark.parametrize("version", ["0.26.0", "0.28.1rc2.dev3+g1234567", "0.32.9"])
def test_a_tested_version_is_not_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert versions.configured(_config()) is not None


@pytest.mark.parametrize("where", ["vllm.v1.no_such_module:f", "vllm.v1.request:Request.no_such_method"])
def test_what_is_missing_stops_the_engines_that_steer_and_no_others(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "MISSING", [])
    install._install(where, scheduler._add_request)
    with pytest.raises(StartError, match=where):
        versions.configured(_config(allow_untested_vllm=True))
    assert versions.configured(VllmConfig()) is None


def test_the_releases_are_the_same_in_three_places() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    [requirement] = [each for each in extras["vllm"] if each.startswith("vllm")]
    (first, last), admitted = versions.TESTED, SpecifierSet(requirement.removeprefix("vllm"))
    inside = [f"{major}.{minor}.1" for major, minor in (first, last)]
    outside = [f"{first[0]}.{first[1] - 1}.9", f"{last[0]}.{last[1] + 1}.0"]
    assert [*admitted.filter([*outside, *inside])] == inside

    lines = re.findall(r"^(?:VLLM|OLDER) := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    installed = [version for line in lines for version in line.split()]
    assert len(installed) == 3
    assert all(version in admitted for version in installed)
