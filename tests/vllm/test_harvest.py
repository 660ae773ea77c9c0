"""``sae-steer calibrate --engine vllm``: the same tokens and the same statistics as with transformers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from typer.testing import CliRunner

from sae_steer import embedded
from sae_steer.calibration.encode import Encoder
from sae_steer.calibration.record import Calibration
from sae_steer.catalog import ProfileStore
from sae_steer.errors import NonFinite, StartError
from sae_steer.sae import open_sae
from sae_steer.schema import Profile
from sae_steer_cli.cli import app
from sae_steer_vllm.harvest import HARVEST, Harvest, refuse_options
from tests.topic_texts import sentences, write
from tests.vllm.engine_script import ENVIRONMENT


def read(folder: Path) -> tuple[Profile, Calibration]:
    profile = ProfileStore(folder.parent).get(folder.name)
    assert profile.calibration is not None
    return profile, Calibration.read(folder, profile.calibration)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_engines_agree(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", sentences(300, 3, ("food", "music", "sea")))
    # Some texts are longer than 10 tokens: both engines must cut them alike.
    same = ["--model", "demo", "--dtype", "float32", "--data", str(data), "--concept", "sea", "--tokens", "all"]
    same += ["--max-length", "10", "--quiet"]
    hf = CliRunner().invoke(app, ["calibrate", *same, "--out", str(tmp_path / "hf")])
    assert hf.exit_code == 0, hf.output
    # Prompts in chunks of a step that holds 32 tokens of up to 8 requests.
    engine = '{"max_num_batched_tokens": 32, "max_num_seqs": 8, "enable_chunked_prefill": true}'
    mine = ["--engine", "vllm", "--engine-args", engine, "--out", str(tmp_path / "vllm")]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sae_steer_cli", "calibrate", *same, *mine],
        capture_output=True, text=True, timeout=800, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (one, ours), (other, theirs) = read(tmp_path / "hf"), read(tmp_path / "vllm")
    assert one.calibration is not None
    assert other.calibration is not None
    assert other.calibration.model_copy(update={"file": one.calibration.file}) == one.calibration
    assert torch.equal(ours.features, theirs.features)
    # A pre-activation that is nearly on its threshold may fall to either side.
    assert int((ours.fired - theirs.fired).abs().sum()) <= 3
    torch.testing.assert_close(theirs.mean, ours.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(theirs.log_density.exp(), ours.log_density.exp(), rtol=0, atol=1e-3)
    for printed in (hf.stdout, done.stdout):
        assert "texts were longer than the model takes, and cut there" in printed


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.whole(open_sae(embedded.SAE))


def step(harvest: Harvest, requests: list[str], chunks: list[tuple[int, int]], x: torch.Tensor) -> None:
    """A forward pass over a chunk of each request's rows of ``x``, with what a compiled runner pads."""
    starts = torch.tensor([0, *np.cumsum([end - start for start, end in chunks])])
    positions = torch.cat([torch.arange(*chunk) for chunk in chunks])
    harvest.begin(requests, starts, torch.cat([positions, torch.zeros(3, dtype=torch.int64)]))
    rows = torch.cat([x[start:end] for start, end in chunks] + [torch.full((3, x.shape[1]), torch.nan)])
    harvest.see(rows / 4, rows * 3 / 4)


def test_a_position_counts_once_however_it_is_computed(encoder: Encoder) -> None:
    x = torch.randn(12, encoder.width) * 3
    wanted = {HARVEST: [1, 1, 2, 3, 9]}  # one label, number 1; positions 2, 3 and 9
    harvest = Harvest(encoder, 2, 2**20)
    harvest.meet("a", wanted)
    harvest.meet("b", None)  # another client's request in the same batch
    step(harvest, ["b", "a"], [(0, 5), (0, 4)], x)
    step(harvest, ["a"], [(0, 8)], x)  # preempted, and computed again from the start
    harvest.meet("a", wanted)
    step(harvest, ["a"], [(8, 12)], x)
    found = load(harvest.take())
    whole = Harvest(encoder, 2, 2**20)
    whole.meet("a", wanted)
    step(whole, ["a"], [(0, 12)], x)
    expected = load(whole.take())
    assert found["observations"].tolist() == [0, 3]
    assert found.keys() == expected.keys()
    for name in ("cells", "fired", "keys", "counts"):
        assert torch.equal(found[name], expected[name]), name
    assert load(harvest.take())["observations"].tolist() == [0, 0], "what was taken is not counted again"


def test_values_that_are_not_finite_end_the_calibration_and_not_the_engine(encoder: Encoder) -> None:
    harvest = Harvest(encoder, 1, 2**20)
    harvest.meet("a", {HARVEST: [1, 0, 0]})
    step(harvest, ["a"], [(0, 2)], torch.full((2, encoder.width), torch.inf))
    with pytest.raises(NonFinite, match="not finite"):
        harvest.take()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enforce_eager": False}, "enforce_eager is not yours to set"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching is not yours to set"),
        ({"model": "x"}, "the model is named with --model"),
        ({"data_parallel_size": 2}, "one command for each part"),
    ],
)
def test_options_under_which_tokens_would_be_missed_are_refused(options: dict, says: str) -> None:
    with pytest.raises(StartError, match=says):
        refuse_options(options)
    refuse_options({"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "data_parallel_size": 1})


def test_engine_arguments_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [("a", "x"), ("b", "y")])
    for text, says in (
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"dtype": "auto"}', "not yours to set"),
    ):
        options = ["--data", str(data), "--concept", "x", "--out", str(tmp_path / "p"), "--engine", "vllm"]
        result = CliRunner().invoke(app, ["calibrate", "--model", "demo", *options, "--engine-args", text])
        assert result.exit_code == 2
        assert says in result.stderr
