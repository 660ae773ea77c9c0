"""The canonical layout: one safetensors file in which a feature is one contiguous row, and every fold is done.

``sae_steer.safetensors`` holds the fields of :class:`~sae_steer.sae.record.FeatureRows` for all features, under their
own names, ``enc [F, D]`` first, and ``dec_bias [D_out]``, all float32. Its header's metadata say what it is:

    format, format_version   "sae-steer", "1"
    spec                     the parsed spec, as JSON
    source                   family and fingerprint of the checkpoint it was made from, as JSON
    digest                   hex SHA-256 over the tensors' own digests, in the order of their names

The digest stands for the weights in the fingerprint, so that opening a dictionary of any size reads its header alone;
:func:`check` computes it anew. ``convert.py`` writes such files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_steer.errors import CheckpointError, SteerError, UnsupportedCheckpoint
from sae_steer.sae.files import FileSae
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation, FeatureRows, InputNorm, Sae, SaeSpec
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sites import Site

FAMILY_NAME = "canonical"
FILE = "sae_steer.safetensors"
FORMAT, VERSION = "sae-steer", "1"
DEC_BIAS = "dec_bias"
_BLOCK_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class CanonicalRows:
    """All F canonical rows of a file, mapped.

    Args:
        fields: The fields of :class:`FeatureRows` but ``ids``, each ``[F, ...]`` float32.
        dec_bias: ``[D_out]`` float32.
        activation: Of which the names of an unfolded dictionary depend.
    """

    fields: Mapping[str, Tensor]
    dec_bias: Tensor
    activation: Activation

    def rows(self, ids: Tensor) -> FeatureRows:
        """The rows of ``ids``, ``[K]`` int64 within ``[0, F)``."""
        return FeatureRows(ids=ids, **{name: whole[ids] for name, whole in self.fields.items()})

    def unfolded(self) -> dict[str, Tensor]:
        """The rows, whose folds are done, as :meth:`sae_steer.sae.record.Sae.dictionary` states them."""
        wide = {name: whole.to(torch.float64, copy=True) for name, whole in self.fields.items()}
        named = {"W_enc": wide["enc"].T, "W_dec": wide["dec"], "b_dec": self.dec_bias.double()}
        match self.activation:
            case Activation.GATED:
                gate = {"b_gate": wide["bias"], "b_mag": wide["mag_bias"], "r_mag": wide["mag_scale"].log()}
                return named | gate
            case Activation.JUMPRELU:
                return named | {"b_enc": wide["bias"], "threshold": wide["theta"]}
            case _:
                return named | {"b_enc": wide["bias"]}


def shapes(spec: SaeSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of a canonical file, by name, in the order in which they are written."""
    wide: dict[str, tuple[int, ...]] = {"enc": (spec.n_features, spec.d_in), "dec": (spec.n_features, spec.d_out)}
    rows = [field.name for field in fields(FeatureRows) if field.name != "ids"]
    return {name: wide.get(name, (spec.n_features,)) for name in rows} | {DEC_BIAS: (spec.d_out,)}


def recognises(location: Location) -> bool:
    """Whether a place is a canonical file, or a folder that holds one."""
    if location.file is None:
        return location.has(FILE)
    return location.file.suffix == ".safetensors" and _metadata(location.file).get("format") == FORMAT


def open_canonical(location: Location) -> FileSae:
    """Opens a canonical file, or the folder that holds it.

    Raises:
        UnsupportedCheckpoint: It was written by a version of this program that is not known.
        CheckpointError: It is damaged, or no canonical file.
    """
    file = location.file or location.folder / FILE
    mapped = location.open(file)
    tensors = mapped.tensors
    metadata = _metadata(file)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file}: the header's format is {metadata.get('format')!r}; needed is {FORMAT!r}.")
    if metadata.get("format_version") != VERSION:
        raise UnsupportedCheckpoint(
            f"{file}: format_version is {metadata.get('format_version')!r}, and this program reads {VERSION!r}. "
            "Convert the source again with this program."
        )
    spec = _spec_of(_json(metadata, "spec", file), file)
    _check_tensors(tensors, spec, file)
    rows = {name: tensors[name] for name in shapes(spec) if name != DEC_BIAS}
    weights = CanonicalRows(rows, tensors[DEC_BIAS], spec.activation)
    path = location.folder if file.name == FILE else file
    return FileSae(spec, path, weights, (mapped,), _digest(metadata, file))


FAMILY = Family(FAMILY_NAME, f"{FILE}, as sae-steer convert writes it", recognises, open_canonical)


def header_metadata(spec: SaeSpec, *, source_family: str, source_fingerprint: str, digest: str) -> dict[str, str]:
    """The metadata of a canonical file's header."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["site"] = None if spec.site is None else str(spec.site)
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "spec": json.dumps(values),
        "source": json.dumps({"family": source_family, "fingerprint": source_fingerprint}),
        "digest": digest,
    }


def folded(spec: SaeSpec) -> SaeSpec:
    """The spec of a canonical file made from a checkpoint of ``spec``."""
    notes = (*spec.notes, f"converted from a checkpoint of the family {spec.family}: every fold is in its rows")
    return replace(spec, family=FAMILY_NAME, subtracts_decoder_bias=False, dtype="float32", notes=notes)


def combined_digest(digests: Mapping[str, str]) -> str:
    """The digest of all tensors from the hex SHA-256 of each, by name."""
    text = "".join(f"{name}:{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def check(sae: Sae) -> None:
    """Reads all of an opened canonical file; raises :class:`CheckpointError` where it is not what its header says."""
    if not isinstance(sae, FileSae) or not isinstance(sae.weights, CanonicalRows):
        raise CheckpointError(
            f"{sae.path}: a checkpoint of the family {sae.spec.family} holds no digest of its weights to be held "
            "against. Convert it, and check the result."
        )
    (mapped,) = sae.files
    digests = {}
    for name, tensor in mapped.tensors.items():
        hasher = hashlib.sha256()
        step = max(1, _BLOCK_BYTES * len(tensor) // max(1, tensor.nbytes))
        for start in range(0, len(tensor), step):
            hasher.update(tensor[start : start + step].numpy().tobytes())
        digests[name] = hasher.hexdigest()
    found = combined_digest(digests)
    if found != sae.digest:
        raise CheckpointError(
            f"{mapped.path} is damaged: its weights have the digest {found}, and its header says {sae.digest}."
        )


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors header; empty for what is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _json(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, object]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {key} in the header is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {key} in the header must be a JSON object.")
    return value


def _digest(metadata: Mapping[str, str], file: Path) -> str:
    digest = metadata.get("digest", "")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise CheckpointError(f"{file}: digest in the header is {digest[:80]!r}; needed is a SHA-256 in hex.")
    return digest


def _spec_of(values: Mapping[str, object], file: Path) -> SaeSpec:
    settings = Settings(values, file)
    names = {field.name for field in fields(SaeSpec)}
    if values.keys() != names:
        odd = ", ".join(sorted(values.keys() ^ names))
        raise CheckpointError(f"{file}: spec in the header lacks, or has besides what is known, {odd}.")
    notes = values["notes"]
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise settings.bad("notes", "a list of texts")
    site = settings.text("site")
    try:
        return SaeSpec(
            family=FAMILY_NAME,
            architecture=_text(settings, "architecture"),
            activation=Activation(_text(settings, "activation")),
            n_features=settings.count("n_features"),
            d_in=settings.count("d_in"),
            d_out=settings.count("d_out"),
            input_norm=InputNorm(_text(settings, "input_norm")),
            subtracts_decoder_bias=settings.flag("subtracts_decoder_bias", False),
            k=None if values["k"] is None else settings.count("k"),
            site=None if site is None else Site.parse(site),
            model_name=settings.text("model_name"),
            dtype=_text(settings, "dtype"),
            value_convention=_text(settings, "value_convention"),
            notes=tuple(notes),
            skip=settings.flag("skip", False),
        )
    except (ValueError, SteerError) as error:
        raise CheckpointError(f"{file}: spec in the header makes no sense: {error}") from error


def _text(settings: Settings, key: str) -> str:
    value = settings.text(key)
    if value is None:
        raise settings.bad(key, "text")
    return value


def _check_tensors(tensors: Mapping[str, Tensor], spec: SaeSpec, file: Path) -> None:
    wanted = shapes(spec)
    if tensors.keys() != wanted.keys():
        odd = ", ".join(sorted(tensors.keys() ^ wanted.keys()))
        raise CheckpointError(f"{file} lacks, or holds besides what belongs there, {odd}.")
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype} of the shape {list(tensor.shape)}, and by the header it should be "
                f"float32 of the shape {list(shape)}."
            )
    if (spec.activation is Activation.TOPK) != (spec.k is not None) or (spec.k or 0) > spec.n_features:
        raise CheckpointError(f"{file}: spec in the header has k = {spec.k} for {spec.activation}.")
    if spec.subtracts_decoder_bias:
        raise CheckpointError(f"{file}: spec in the header asks for a fold, and in this layout all folds are done.")
