"""Rules about the architecture that no one module can keep: folders, imports, packaging, dangerous calls."""

import ast
import configparser
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ("kernels", "server_plugins")
PACKAGES = tuple(
    path
    for path in (
        ROOT / "sae_steer",
        ROOT / "kernels" / "sae_steer_kernels",
        ROOT / "server_plugins" / "sae_steer_bench",
        ROOT / "server_plugins" / "sae_steer_cli",
        ROOT / "server_plugins" / "sae_steer_http",
        ROOT / "server_plugins" / "sae_steer_server",
        ROOT / "server_plugins" / "sae_steer_vllm",
    )
    if path.is_dir()
)
CODE_FOLDERS = ("sae_steer", "kernels", "server_plugins", "tests", "examples")
OTHER_FOLDERS = ("benchmarks", "docs")
LINE_LIMIT = 400
LONGER = f"Longer than {LINE_LIMIT} lines because"


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


SOURCES = _sources(*PACKAGES)
ALL_PYTHON = _sources(*(ROOT / name for name in (*CODE_FOLDERS, "benchmarks") if (ROOT / name).is_dir()))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=_relative(path))


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The dotted name of every import in a file, wherever it stands, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno
        elif (
            isinstance(node, ast.Call)
            and _dotted(node.func) in {"__import__", "import_module", "importlib.import_module"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.args[0].value, node.lineno


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def _importing(paths: list[Path], package: str) -> list[str]:
    return [
        f"{_relative(path)}:{line}"
        for path in paths
        for name, line in _imported(_parse(path))
        if name == package or name.startswith(package + ".")
    ]


def test_top_level_folders() -> None:
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    found -= {"__pycache__", "build", "dist"}  # made by tools, and ignored by git
    assert found <= {*CODE_FOLDERS, *OTHER_FOLDERS}
    assert {"sae_steer", "kernels", "server_plugins", "tests"} <= found


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_are_not_packages(container: str) -> None:
    assert not (ROOT / container / "__init__.py").exists(), "an importable `kernels` shadows Hugging Face's"
    assert not list((ROOT / container).glob("*.py")), "code belongs in a package, not in the container"


@pytest.mark.parametrize("package", PACKAGES, ids=_relative)
def test_packages_are_typed(package: Path) -> None:
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()


def test_every_package_is_listed() -> None:
    # One that a list forgets would be left out of the check, or of the wheel, without a sound.
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    names = {path.name for path in PACKAGES}
    paths = {_relative(path) for path in PACKAGES}
    assert set(contracts["importlinter"]["root_packages"].split()) == names
    assert set(tool["hatch"]["build"]["targets"]["wheel"]["packages"]) == paths
    assert set(tool["mypy"]["packages"]) == names
    assert set(tool["pyright"]["include"]) == paths | {"tests"}
    assert names <= set(tool["ruff"]["lint"]["isort"]["known-first-party"])


def test_nobody_imports_the_container() -> None:
    assert _importing(ALL_PYTHON, "kernels") == []
    assert _importing(ALL_PYTHON, "server_plugins") == []


def test_only_compat_imports_vllm() -> None:
    compat = ROOT / "server_plugins" / "sae_steer_vllm" / "compat"
    others = [path for path in SOURCES if path.parent != compat]
    assert len(others) < len(SOURCES)
    assert _importing(others, "vllm") == []


def test_only_the_kernels_import_triton() -> None:
    others = [path for path in SOURCES if "sae_steer_kernels" not in path.parts]
    assert _importing(others, "triton") == []


def test_import_contracts() -> None:
    # Its own process: the graph is built from the installed packages, without what this run has imported.
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_layer_of_the_contract_exists() -> None:
    # A renamed module would drop out of the contract without a sound: its layers are optional there.
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter", encoding="utf-8")
    layers = config["importlinter:contract:core"]["layers"].replace("|", "\n").replace(":", "\n").split("\n")
    names = [name.strip().strip("()") for name in layers if name.strip()]
    missing = [
        name
        for name in names
        if not (ROOT / "sae_steer" / f"{name}.py").is_file()
        and not (ROOT / "sae_steer" / name / "__init__.py").is_file()
    ]
    assert missing == []


def test_long_files_say_why() -> None:
    silent = []
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        docstring = " ".join((ast.get_docstring(_parse(path)) or "").split())
        if lines > LINE_LIMIT and LONGER not in docstring:
            silent.append(f"{_relative(path)}: {lines} lines")
    assert silent == []


PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
EVALUATORS = {"eval", "exec", "builtins.eval", "builtins.exec"}


def _is_only_the_error(node: ast.AST) -> bool:
    """`from pickle import UnpicklingError`, which loads nothing."""
    return isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["UnpicklingError"]


def _dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each place where a file could run code that came with the data."""
    errors = {node.lineno for node in ast.walk(tree) if _is_only_the_error(node)}
    for name, line in _imported(tree):
        if name.split(".")[0] in PICKLES and line not in errors:
            yield line, f"import {name}"
    # What torch.load is called here: `torch.load`, `t.load` after `import torch as t`, or an imported name.
    loaders = {"torch.load"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            loaders |= {f"{alias.asname}.load" for alias in node.names if alias.name == "torch" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "torch.serialization"}:
            loaders |= {alias.asname or alias.name for alias in node.names if alias.name == "load"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in EVALUATORS:
                yield node.lineno, f"{name}("
            if name in loaders and not _is_true(keywords.get("weights_only")):
                yield node.lineno, f"{name}( without weights_only=True"
            if "trust_remote_code" in keywords and not _is_false(keywords["trust_remote_code"]):
                yield node.lineno, "trust_remote_code"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if named and not _is_false(value):
                    yield node.lineno, "trust_remote_code"


def _is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_code_from_data() -> None:
    found = [f"{_relative(path)}:{line}: {what}" for path in SOURCES for line, what in _dangers(_parse(path))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "importlib.import_module('dill')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "eval(text)",
        "def f():\n    exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': flag}",
    ],
)
def test_the_check_for_code_from_data_sees(code: str) -> None:
    assert list(_dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "json.load(stream)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_the_check_for_code_from_data_passes(code: str) -> None:
    assert not list(_dangers(ast.parse(code)))
