"""``sae-steer inspect`` and ``sae-steer convert``: what they say, and that a failure is one line and leaves nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sae_steer.sae import open_sae
from sae_steer_cli.cli import app
from tests.sae_files import write_labels, write_saelens
from tests.sae_writers.gemma import write_scope

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)), env=PLAIN)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a source"
    write_saelens(folder, architecture="topk")
    write_labels(folder, {3: ("boats", 2.0)})
    return folder


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_help_teaches(command: str) -> None:
    found = run(command, "--help").stdout
    assert f"sae-steer {command} org/repo/layer_12@main" in found


def test_inspect_says_what_it_is(source: Path) -> None:
    done = run("inspect", source)
    assert done.exit_code == 0
    for line in (
        "family       saelens (topk)",
        "forward      pre = <w, N(x) - b_dec> + b; f = max(pre, 0) where pre is among the k largest, else 0",
        "k            4",
        "features     32",
        "width        16",
        "site         resid_post.2",
        "model        tiny",
        "labels       1",
        "decoder row norm: ",
        "note: ranks need the whole dictionary in memory: serve it with --whole",
    ):
        assert line in done.stdout


def test_inspect_for_programs(source: Path) -> None:
    found = json.loads(run("inspect", source, "--json").stdout)
    sae = open_sae(source)
    assert found["fingerprint"] == sae.fingerprint
    assert (found["features"], found["k"], found["site"]) == (32, 4, "resid_post.2")
    low, middle, high = found["sample"]["decoder row norm"]
    assert low <= middle <= high
    assert high == pytest.approx(float(sae.rows(range(32)).dec.double().norm(dim=1).max()))


def test_inspect_tells_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a", tensors={"b_enc": torch.full((32,), torch.nan)})
    done = run("inspect", tmp_path / "a")
    assert done.exit_code == 0
    assert "note: " in done.stdout
    assert "are not finite" in done.stdout


def test_inspect_asks_for_a_site(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a", cfg={"metadata": {}})
    found = run("inspect", tmp_path / "a").stdout
    assert "site         not said" in found
    assert "name its site" in found


def test_convert_then_inspect(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "made here"
    done = run("convert", source, target)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "32 features" in done.stderr
    assert f"sae-steer inspect '{target}'" in done.stderr
    assert {path.name for path in target.iterdir()} == {"sae_steer.safetensors", "features.json"}
    shown = run("inspect", target, "--check")
    assert shown.exit_code == 0
    assert "family       canonical (topk)" in shown.stdout
    assert "labels       1" in shown.stdout
    content = bytearray((target / "sae_steer.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "sae_steer.safetensors").write_bytes(bytes(content))
    damaged = run("inspect", target, "--check")
    assert damaged.exit_code == 2
    assert "is damaged" in damaged.stderr


def test_a_compressed_archive_is_inspected_after_it_is_converted(tmp_path: Path) -> None:
    archive = write_scope(tmp_path / "width_16k", compressed=True)
    refused = run("inspect", archive)
    assert refused.exit_code == 2
    line = refused.stderr.rpartition("sae-steer convert ")[2].split()
    assert line[0] == str(archive)
    target = tmp_path / "made"
    assert run("convert", archive, target, "--quiet").exit_code == 0
    assert "family       canonical" in run("inspect", target, "--check").stdout
    assert {path.name for path in tmp_path.iterdir()} == {"width_16k", "made"}
    assert {path.name for path in archive.parent.iterdir()} == {archive.name}


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a", tensors={"W_enc": torch.full((16, 32), torch.inf)})
    done = run("convert", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 2
    assert "are not finite" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_mistakes_are_one_line(source: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("inspect", tmp_path / "nowhere"), "There is no folder"),
        (("inspect", source, "--family", "mystery"), "no checkpoint family 'mystery'"),
        (("inspect", source, "--check"), "holds no digest"),
        (("convert", source, source), "is there already"),
        (("convert", source, tmp_path / "a" / "b"), "there is no folder"),
        (("convert", tmp_path / "nowhere", tmp_path / "b"), "There is no folder"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
