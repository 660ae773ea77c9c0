"""Dictionaries larger than memory: sparse files of their size, of which only the rows asked for are read."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_steer.sae import open_sae

D_IN, FEATURES = 256, 10 * 2**20
STATUS = Path("/proc/self/status")
needs_proc = pytest.mark.skipif(not STATUS.exists(), reason="private memory is read from /proc, which is Linux's")


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros that takes no place on disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def saelens(folder: Path) -> None:
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": FEATURES, "sae_lens_version": "6.0.0"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    shapes = {"W_enc": [D_IN, FEATURES], "W_dec": [FEATURES, D_IN], "b_enc": [FEATURES], "b_dec": [D_IN]}
    write_sparse(folder / "sae_weights.safetensors", shapes)


def sparsify(folder: Path) -> None:
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "num_latents": FEATURES, "k": 32}))
    rows = [FEATURES, D_IN]
    shapes = {"encoder.weight": rows, "encoder.bias": [FEATURES], "W_dec": rows, "b_dec": [D_IN]}
    write_sparse(folder / "sae.safetensors", shapes)


def private() -> int:
    """Bytes of this process that are not the page cache's."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@needs_proc
@pytest.mark.parametrize("write", [saelens, sparsify])
def test_twenty_gigabytes_in_two_hundred_megabytes(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    assert max(file.stat().st_size for file in tmp_path.iterdir()) > 19e9
    # Columns that lie apart cost a page of the cache, and what the system reads ahead, for each of their numbers.
    ids = range(64) if write is saelens else range(0, FEATURES, FEATURES // 64)
    before = private()
    rows = open_sae(tmp_path).rows(ids)
    assert (len(rows.ids), rows.enc.shape) == (64, (64, D_IN))
    assert private() - before < 200e6
