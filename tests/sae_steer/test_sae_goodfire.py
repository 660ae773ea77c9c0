"""Goodfire: ReLU on the raw residual stream, one torch file each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_steer.errors import CheckpointError
from sae_steer.sae import open_sae
from tests.sae_forward import assert_converts, assert_forward, tokens
from tests.sae_writers.goodfire import FILE, write_goodfire


def forward(raw: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    raw = {name: tensor.double() for name, tensor in raw.items()}
    f = (x @ raw["encoder_linear.weight"].T + raw["encoder_linear.bias"]).relu()
    return f, f @ raw["decoder_linear.weight"].T + raw["decoder_linear.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [16, 32])
def test_forward(tmp_path: Path, d_in: int, dtype: torch.dtype) -> None:
    written = write_goodfire(tmp_path, d_in=d_in, dtype=dtype)
    sae, x = open_sae(tmp_path), tokens(d_in)
    assert (sae.spec.family, str(sae.spec.site)) == ("goodfire", "resid_post.19")
    assert sae.spec.model_name == "Llama-3.1-8B-Instruct"
    assert_forward(sae, x, *forward(written, x))
    assert open_sae(tmp_path / FILE).fingerprint == sae.fingerprint
    if d_in == 16 and dtype == torch.float32:
        assert_converts(sae, tmp_path / "converted")


SPOILT: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "transposed encoder": lambda raw: {"encoder_linear.weight": raw["encoder_linear.weight"].T},
    "transposed decoder": lambda raw: {"decoder_linear.weight": raw["decoder_linear.weight"].T},
    "bias sign": lambda raw: {"decoder_linear.bias": -raw["decoder_linear.bias"]},
}


@pytest.mark.parametrize("wrong", [*SPOILT, "subtracted"])
def test_wrong_forwards_show(tmp_path: Path, wrong: str) -> None:
    written = write_goodfire(tmp_path, d_in=32)
    sae, x = open_sae(tmp_path), tokens(32)
    seen = x - written["decoder_linear.bias"].double() if wrong == "subtracted" else x
    spoilt = SPOILT[wrong](written) if wrong in SPOILT else {}
    with pytest.raises(AssertionError, match="not close"):
        assert_forward(sae, x, *forward(written | spoilt, seen))


def test_another_name_says_no_site(tmp_path: Path) -> None:
    write_goodfire(tmp_path, file="mine.pt")
    spec = open_sae(tmp_path / "mine.pt").spec
    assert (spec.site, spec.model_name) == (None, None)
    assert any("name its site" in note for note in spec.notes)


def test_order_and_other_tensors_change_nothing(tmp_path: Path) -> None:
    written = write_goodfire(tmp_path / "a")
    (tmp_path / "b").mkdir()
    torch.save(dict(reversed(written.items())) | {"steps": 3, "mean": torch.ones(16)}, tmp_path / "b" / FILE)
    a, b = (open_sae(tmp_path / name).rows(range(32)) for name in "ab")
    assert torch.equal(a.enc, b.enc)
    assert torch.equal(a.dec, b.dec)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"decoder_linear.weight": torch.ones(32, 16)}, r"decoder_linear\.weight has the shape \[32, 16\].*\[16, 32\]"),
        ({"encoder_linear.bias": torch.ones(31)}, r"encoder_linear\.weight has the shape \[32, 16\].*\[31, 16\]"),
        ({"encoder_linear.weight": torch.ones(32, 16, dtype=torch.int64)}, r"stored as torch\.int64"),
        ({"encoder_linear.weight": [1.0]}, "lacks encoder_linear.weight"),
    ],
)
def test_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    write_goodfire(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        open_sae(tmp_path)
