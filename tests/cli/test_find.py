"""``sae-steer find`` on a model whose features are known."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import sae_steer
from sae_steer import embedded
from sae_steer_cli.cli import app
from tests.topic_texts import sentences

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, topics in (("sea", ("sea",)), ("other", ("music", "snow", "trains"))):
        (folder / f"{name}.txt").write_text("\n".join(text for text, _ in sentences(150, 2, topics)) + "\n")
    return folder / "sea.txt", folder / "other.txt"


def call(files: tuple[Path, Path], *more: str) -> Result:
    options = ["--positive", str(files[0]), "--negative", str(files[1]), "--dtype", "float32", "--top", "5"]
    return CliRunner().invoke(app, ["find", "--model", "demo", *options, *more], env=PLAIN)


@pytest.mark.parametrize("by", ["separability", "dprime", "rate", "effect"])
def test_the_known_features_are_found(files: tuple[Path, Path], by: str) -> None:
    result = call(files, "--by", by, "--json", "--effect-texts", "20", "--example-texts", "60")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["features"]
    concepts = json.loads((embedded.SAE / "concepts.json").read_text())["concepts"]["sea"]
    known = {int(feature) for feature in concepts["candidates"]}
    assert len(found) == 5
    assert len(known & {entry["feature"] for entry in found}) >= 3
    key = {"separability": "distance", "dprime": "dprime", "effect": "effect"}.get(by)
    order = [entry[key] if key else entry["rate"] - entry["rate_rest"] for entry in found]
    assert order == sorted(order, reverse=True)
    best = next(entry for entry in found if entry["feature"] in known)
    assert best["effect"] > 0, "without it the model predicts text of the sea worse"
    assert {example["label"] for example in best["examples"]} == {"positive"}
    values = [example["value"] for example in best["examples"]]
    assert values == sorted(values, reverse=True)


def test_an_effect_is_the_change_of_the_loss(files: tuple[Path, Path]) -> None:
    [first, *_] = json.loads(call(files, "--json", "--effect-texts", "12", "--examples", "0").stdout)["features"]
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    ablate = {"interventions": [{"sae": "e", "features": [first["feature"]], "op": "ablate"}]}
    losses = {}
    with sae_steer.attach(model, saes={"e": embedded.SAE}) as steer, torch.no_grad():
        for name, ask in (("plain", None), ("ablated", ablate)):
            nats = tokens = 0.0
            for text in files[0].read_text().splitlines()[:12]:
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                with steer.rows([ask]):
                    logits = model(ids).logits[0, :-1].log_softmax(-1)
                nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
                tokens += ids.shape[1] - 1
            losses[name] = nats / tokens
    assert first["effect"] == pytest.approx(losses["ablated"] - losses["plain"], abs=1e-4)
    assert first["examples"] == []


def test_examples_mark_the_token(files: tuple[Path, Path]) -> None:
    result = call(files, "--effect-texts", "0", "--examples", "2")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if ", line " in line]
    assert len(lines) == 10
    texts = {path.stem: path.read_text().splitlines() for path in files}
    for line in lines:
        label, rest = line.split(", line ")
        number, shown = rest.split(": ", 1)
        before, token_after = shown.split("[[", 1)
        token, after = token_after.split("]]", 1)
        text = texts["sea" if label.split()[-1] == "positive" else "other"][int(number) - 1]
        assert token
        assert (before + token + after).replace("<s>", "").strip() in text


def test_refusals(files: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    result = call((empty, files[1]))
    assert result.exit_code == 2
    assert "no row can be used" in result.stderr
    result = call((files[1], files[1]), "--effect-texts", "0", "--by", "effect")
    assert result.exit_code == 2
    assert "--by effect needs effects" in result.stderr
