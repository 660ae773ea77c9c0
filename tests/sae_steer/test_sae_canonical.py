"""The canonical layout: what it was made from to the bit, opened at once, and nothing that is not whole."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae_steer.catalog import CatalogSae
from sae_steer.errors import CheckpointError, UnknownFeature, UnsupportedCheckpoint
from sae_steer.sae import FeatureRows, Sae, open_sae
from sae_steer.sae import canonical as layout
from sae_steer.sae.convert import convert
from tests.sae_files import SAELENS_ARCHITECTURES, write_labels, write_saelens
from tests.sae_writers.qwen_scope import write_qwen_scope

F = 32


def converted(tmp_path: Path, **arguments: Any) -> tuple[Sae, Sae]:
    write_saelens(tmp_path / "source", **arguments)
    source = open_sae(tmp_path / "source")
    convert(source, tmp_path / "made")
    return source, open_sae(tmp_path / "made")


def assert_same_rows(source: Sae, made: Sae) -> None:
    for ids in (range(source.spec.n_features), [5, 0, 5], []):
        first, second = source.rows(ids), made.rows(ids)
        for field in dataclasses.fields(FeatureRows):
            assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name
    assert torch.equal(source.decoder_bias(), made.decoder_bias())


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", SAELENS_ARCHITECTURES)
def test_rows_are_the_sources_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, norm: str
) -> None:
    monkeypatch.setattr("sae_steer.sae.convert._LEAST_ROWS", 5)  # several blocks, the last of them shorter
    monkeypatch.setattr("sae_steer.sae.convert._BLOCK_BYTES", 1)
    transcoder = architecture.endswith("transcoder")
    arguments = {"d_out": 24} if transcoder else {"normalize_activations": norm}
    source, made = converted(tmp_path, architecture=architecture, dtype=torch.bfloat16, **arguments)
    assert_same_rows(source, made)
    a, b = source.spec, made.spec
    unchanged = {f.name for f in dataclasses.fields(a)} - {"family", "subtracts_decoder_bias", "dtype", "notes"}
    assert all(getattr(a, name) == getattr(b, name) for name in unchanged)
    assert (b.family, b.subtracts_decoder_bias, b.dtype) == ("canonical", False, "float32")
    assert b.notes == (*a.notes, "converted from a checkpoint of the family saelens: every fold is in its rows")


def test_decoder_norm_units_and_a_square_dictionary(tmp_path: Path) -> None:
    source, made = converted(
        tmp_path, architecture="topk", d_in=F, n_features=F, cfg={"rescale_acts_by_decoder_norm": True}
    )
    assert_same_rows(source, made)
    assert made.spec.value_convention == "decoder_norm"


def test_what_references_compute_from(tmp_path: Path) -> None:
    from sae_steer.reference import encode

    x = torch.randn(16, dtype=torch.float64) * 2
    for architecture in ("standard", "jumprelu", "gated", "topk"):
        source, made = converted(tmp_path / architecture, architecture=architecture)
        torch.testing.assert_close(encode(made, x), encode(source, x), rtol=1e-5, atol=1e-6)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_steer.sae.convert._LEAST_ROWS", 10)
    monkeypatch.setattr("sae_steer.sae.convert._BLOCK_BYTES", 1)
    write_saelens(tmp_path / "source")
    told: list[int] = []
    convert(open_sae(tmp_path / "source"), tmp_path / "made", told.append)
    assert told == [10, 10, 10, 2]


def test_labels_come_along(tmp_path: Path) -> None:
    write_saelens(tmp_path / "source")
    write_labels(tmp_path / "source", {3: ("boats", 2.0)})
    convert(open_sae(tmp_path / "source"), tmp_path / "made")
    labels = CatalogSae.make("x", open_sae(tmp_path / "made")).labels
    assert labels is not None
    assert labels.get(3).label == "boats"


def test_labels_of_a_checkpoint_of_one_file_come_along(tmp_path: Path) -> None:
    path, _ = write_qwen_scope(tmp_path)
    write_labels(tmp_path, {3: ("boats", 2.0)})
    (tmp_path / "features.json").rename(path.parent / "layer7.sae.features.json")
    convert(open_sae(path), tmp_path / "made")
    labels = CatalogSae.make("x", open_sae(tmp_path / "made")).labels
    assert labels is not None
    assert labels.get(3).label == "boats"


def test_other_libraries_read_it(tmp_path: Path) -> None:
    source, _ = converted(tmp_path)
    tensors = load_file(tmp_path / "made" / layout.FILE)
    assert torch.equal(tensors["enc"], source.rows(range(F)).enc)
    with safe_open(tmp_path / "made" / layout.FILE, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["source"]) == {"family": "saelens", "fingerprint": source.fingerprint}


def test_fingerprint_follows_weights_and_meaning(tmp_path: Path) -> None:
    prints = {}
    for name, arguments in (("a", {}), ("again", {}), ("seed", {"seed": 1}), ("arch", {"architecture": "standard"})):
        prints[name] = converted(tmp_path / name, **arguments)[1].fingerprint
    assert prints["a"] == prints["again"]
    assert len(set(prints.values())) == 3
    first = load_file(tmp_path / "a" / "made" / layout.FILE)
    assert first  # the same bytes of weights under another site are another dictionary
    metadata = _metadata(tmp_path / "a" / "made" / layout.FILE)
    spec = json.loads(metadata["spec"]) | {"site": "resid_post.7"}
    save_file(first, tmp_path / "a" / "made" / layout.FILE, metadata | {"spec": json.dumps(spec)})
    assert open_sae(tmp_path / "a" / "made").fingerprint != prints["a"]


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_check_finds_one_wrong_bit(tmp_path: Path) -> None:
    converted(tmp_path)
    file = tmp_path / "made" / layout.FILE
    layout.check(open_sae(file.parent))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"is damaged: its weights have the digest [0-9a-f]{64}"):
        layout.check(open_sae(file))
    with pytest.raises(CheckpointError, match="family saelens holds no digest"):
        layout.check(open_sae(tmp_path / "source"))


@pytest.mark.parametrize("broken", ["row", "disk", "rename"])
def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    written = write_saelens(tmp_path / "source")
    if broken == "row":
        damaged = written["W_dec"].clone()
        damaged[20, 0] = torch.nan
        write_saelens(tmp_path / "source", tensors={"W_dec": damaged})
    sae = open_sae(tmp_path / "source")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if broken == "disk":
        monkeypatch.setattr("os.fsync", fails)
    if broken == "rename":
        monkeypatch.setattr(Path, "rename", fails)
    message = r"features \[20\] are not finite" if broken == "row" else "cannot be written.*No space left"
    with pytest.raises(CheckpointError, match=message):
        convert(sae, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interruption_leaves_nothing_either(tmp_path: Path) -> None:
    write_saelens(tmp_path / "source")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(open_sae(tmp_path / "source"), tmp_path / "made", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_saelens(tmp_path / "source")
    sae = open_sae(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("source", "empty", "file", "link"):
        with pytest.raises(CheckpointError, match="is there already"):
            convert(sae, tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no folder"):
        convert(sae, tmp_path / "a" / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, and 0\.0 GB are free"):
        convert(sae, tmp_path / "made")


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def _spec(**changes: Any) -> Change:
    def change(metadata: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        metadata["spec"] = json.dumps(json.loads(metadata["spec"]) | changes)

    return change


def _header(**changes: str) -> Change:
    return lambda metadata, _: metadata.update(changes)


def _tensor(name: str, tensor: torch.Tensor | None) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_header(format="other"), "format is 'other'; needed is 'sae-steer'"),
        (_header(format_version="2"), "format_version is '2'.*reads '1'"),
        (_header(digest="xyz"), "digest in the header is 'xyz'"),
        (_header(spec="{"), "spec in the header is not readable JSON"),
        (_header(spec="[" * 20000), "spec in the header is not readable JSON"),
        (_header(spec="[]"), "spec in the header must be a JSON object"),
        (_spec(colour=1), "has besides what is known, colour"),
        (_spec(activation="gelu"), "'gelu' is not a valid Activation"),
        (_spec(input_norm=3), "input_norm is 3; needed is text"),
        (_spec(site="nowhere"), "'nowhere' is not a place"),
        (_spec(n_features=0), "n_features is 0"),
        (_spec(n_features=31), r"enc is torch.float32 of the shape \[32, 16\].*of the shape \[31, 16\]"),
        (_spec(activation="topk"), "k = None for topk"),
        (_spec(activation="topk", k=33), "k = 33 for topk"),
        (_spec(k=3), "k = 3 for jumprelu"),
        (_spec(subtracts_decoder_bias=True), "all folds are done"),
        (_spec(notes="x"), "notes is 'x'; needed is a list"),
        (_spec(architecture=None), "architecture is None; needed is text"),
        (_tensor("theta", None), "lacks, or holds besides what belongs there, theta"),
        (_tensor("more", torch.ones(3)), "lacks, or holds besides what belongs there, more"),
        (_tensor("bias", torch.ones(F, dtype=torch.float64)), r"bias is torch\.float64"),
        (_tensor("dec", torch.ones(16, F)), r"dec is torch\.float32 of the shape \[16, 32\]"),
    ],
)
def test_refused(tmp_path: Path, change: Change, message: str) -> None:
    converted(tmp_path)
    file = tmp_path / "made" / layout.FILE
    metadata, tensors = _metadata(file), load_file(file)
    change(metadata, tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_sae(tmp_path / "made")
    assert str(file) in caught.value.message
    if "reads '1'" in message:
        assert isinstance(caught.value, UnsupportedCheckpoint)


@pytest.mark.parametrize("keep", [0, 7, 40, -5])
def test_truncated(tmp_path: Path, keep: int) -> None:
    converted(tmp_path)
    file = tmp_path / "made" / layout.FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_sae(tmp_path / "made")


def test_unknown_feature(tmp_path: Path) -> None:
    _, made = converted(tmp_path)
    with pytest.raises(UnknownFeature, match=r"no feature 32.*0 to 31"):
        made.rows([32])


def _private() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("private memory is read from /proc, which is Linux's")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_a_large_file_opens_at_once_and_in_little_memory(tmp_path: Path) -> None:
    features, width = 131_072, 2304  # 2.4 GB, of which nothing is ever written: a sparse file
    _, made = converted(tmp_path, d_in=8)
    spec = dataclasses.replace(made.spec, n_features=features, d_in=width, d_out=width)
    metadata = layout.header_metadata(spec, source_family="saelens", source_fingerprint="", digest="0" * 64)
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in layout.shapes(spec).items():
        size = 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / layout.FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    seconds, before = [], _private()
    for _ in range(5):
        start = time.perf_counter()
        rows = open_sae(tmp_path / "large").rows(range(0, features, features // 64))
        seconds.append(time.perf_counter() - start)
        assert rows.enc.shape == (64, width)
    assert min(seconds) < 0.05
    assert _private() - before < 100e6


def test_converting_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, width = 2**17, 64
    write_saelens(tmp_path / "source", architecture="standard", d_in=width, n_features=1, cfg={"d_sae": features})
    zeros = {"W_enc": torch.zeros(width, features), "W_dec": torch.zeros(features, width)}
    zeros |= {"b_enc": torch.zeros(features), "b_dec": torch.zeros(width)}
    save_file(zeros, tmp_path / "source" / "sae_weights.safetensors")
    del zeros
    sae = open_sae(tmp_path / "source")
    monkeypatch.setattr("sae_steer.sae.convert._BLOCK_BYTES", 2**20)
    sae.rows(range(4096))  # what is allocated once
    before, peaks = _private(), [0]
    convert(sae, tmp_path / "made", lambda _: peaks.append(_private()))
    size = (tmp_path / "made" / layout.FILE).stat().st_size
    assert size > 2 * features * width * 4
    assert max(peaks) - before < size / 4
