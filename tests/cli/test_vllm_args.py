"""``sae-steer vllm-args``: what it prints reaches vLLM through a shell as it was meant, and mistakes show at once."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sae_steer import embedded
from sae_steer.catalog import CatalogSae
from sae_steer.sae import open_sae
from sae_steer_cli.cli import app
from sae_steer_cli.vllm_args import VLLM_ARGS_HELP
from sae_steer_vllm.config import KEY, PluginConfig, config_of
from tests.calibrations import made_up, write_calibration

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
CONFIG = {
    "saes": [{"name": "embedded", "location": str(embedded.SAE)}],
    "profiles": str(embedded.PROFILES),
    "limits": {"max_programs": 4},
}


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["vllm-args", *map(str, arguments)], env=PLAIN)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration, under a name that a shell could stumble over."""
    path = tmp_path / 'it\'s a "file" $HOME `x` *.json'
    path.write_text(json.dumps(CONFIG))
    return path


def test_help_teaches() -> None:
    found = run("--help").stdout
    for word in (
        'VLLM_PLUGINS=sae_steer vllm serve MODEL --additional-config "$(sae-steer vllm-args --json steer.json)"',
        "eval",
        "xargs",
        "--inline",
        '"saes"',
    ):
        assert word in found


def serve_lines() -> list[str]:
    """The command lines that the help teaches."""
    lines = [line.strip() for line in VLLM_ARGS_HELP.splitlines() if "vllm serve" in line and line.startswith("    ")]
    assert len(lines) == 3
    return lines


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with the command, and with one that stands for vLLM's and says what it got."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tell = "import json, os, sys; print(json.dumps([os.environ['VLLM_PLUGINS'], *sys.argv[1:]]))"
    scripts = {"sae-steer": '-m sae_steer_cli "$@"', "vllm": f'-c "{tell}" "$@"'}
    for name, arguments in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\nexec {sys.executable} {arguments}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("line", "inline"),
    [*((line, "") for line in serve_lines()), (serve_lines()[1], "--inline ")],
    ids=["quoted", "xargs", "eval", "inline"],
)
def test_every_line_that_is_taught_gives_vllm_one_argument(line: str, inline: str, file: Path, commands: Path) -> None:
    line = line.replace("steer.json", f"{inline}{shlex.quote(file.name)}")
    env = PLAIN | {"PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, env=env, cwd=file.parent, check=True
    )
    *before, value = json.loads(done.stdout)
    assert before == ["sae_steer", "serve", "MODEL", "--additional-config"]
    additional = json.loads(value)
    assert config_of(additional) == PluginConfig.model_validate(CONFIG)
    if inline:
        assert additional == {KEY: CONFIG}
    else:
        assert additional[KEY]["file"] == str(file)
        assert additional[KEY]["digest"].startswith("sha256:")


def test_what_was_found_is_told_beside_it(file: Path) -> None:
    done = run("--json", file)
    assert len(done.stdout.splitlines()) == 1
    assert "sae-steer: opening embedded (" in done.stderr
    assert "768 features of width 192, at resid_post.3" in done.stderr
    assert "seaside" in done.stderr


def test_a_relative_name_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = run("--json", "steer.json")
    assert json.loads(done.stdout)[KEY]["file"] == str(tmp_path / "steer.json")


def test_a_changed_file_is_another_argument(tmp_path: Path) -> None:
    file = tmp_path / "steer.json"
    file.write_text("{}")
    before = run("--json", file).stdout
    file.write_text("{ }")
    assert run("--json", file).stdout != before


def test_the_schema_is_that_of_the_file() -> None:
    done = run("--schema")
    assert done.exit_code == 0
    schema = json.loads(done.stdout)
    assert set(schema["properties"]) == set(PluginConfig.model_fields)
    assert schema["additionalProperties"] is False


def profile(folder: Path, **edit: Any) -> str:
    (folder / "p").mkdir()
    intervention = {"sae": "embedded", "features": [1], "op": "ablate"} | edit
    (folder / "p" / "profile.json").write_text(json.dumps({"name": "p", "interventions": [intervention]}))
    return str(folder)


def test_a_profile_that_skips_the_beginning_is_left_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "steer.json").write_text(json.dumps(CONFIG | {"profiles": profile(tmp_path, skip_bos=True)}))
    assert run(tmp_path / "steer.json").exit_code == 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ({"colour": 1}, "colour"),
        ({"saes": [{"name": "a", "location": "/nowhere/at/all"}]}, "There is no folder or file /nowhere/at/all"),
        ({"saes": [CONFIG["saes"][0], CONFIG["saes"][0]]}, "Two SAEs are called 'embedded'"),
        ({"saes": [CONFIG["saes"][0] | {"site": "resid_post.x"}]}, "resid_post.x"),
        ({"vectors": [{"name": "v", "location": "/nowhere.safetensors"}]}, "/nowhere.safetensors"),
        ({"sites": ["nowhere.1"]}, "nowhere.1"),
        ({"profiles": "/nowhere"}, "/nowhere is not a folder"),
        ({"saes": CONFIG["saes"], "profiles": {"features": [768]}}, "Profile 'p' cannot be used"),
        ({"saes": CONFIG["saes"], "profiles": {"op": "app"}}, "Profile 'p' cannot be used"),
    ],
)
def test_a_mistake_is_said_in_one_line_and_nothing_is_printed(config: Any, said: str, tmp_path: Path) -> None:
    if isinstance(config, dict) and isinstance(config.get("profiles"), dict):
        config = config | {"profiles": profile(tmp_path, **config["profiles"])}
    file = tmp_path / "steer.json"
    if config is not None:
        file.write_text(config if isinstance(config, str) else json.dumps(config))
    done = run("--json", file)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]


def test_a_file_is_needed() -> None:
    done = run()
    assert done.exit_code == 2
    assert "name the configuration FILE" in done.stderr


def test_the_hosts_are_not_needed() -> None:
    absent = ("vllm", "fastapi", "starlette", "uvicorn", "httpx")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import sae_steer_cli.__main__ as m; m.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "vllm-args", "--schema"], capture_output=True, text=True, timeout=120, env=PLAIN
    )
    assert done.returncode == 0, done.stderr


def test_whether_a_calibration_is_of_the_model_is_left_to_the_server(tmp_path: Path) -> None:
    entry = CatalogSae.make("embedded", open_sae(embedded.SAE))
    record = made_up([3, 4], 2)
    write_calibration(tmp_path / "profiles", "c", entry, record, labels=("a", "b"), model="sha256:any model")
    file = tmp_path / "steer.json"
    file.write_text(json.dumps(CONFIG | {"profiles": str(tmp_path / "profiles")}))
    assert run(file).exit_code == 0
    (tmp_path / "profiles" / "c" / "profile.safetensors").write_bytes(b"another")
    found = run(file)
    assert found.exit_code == 2
    assert "broken calibration" in found.stderr
