"""sdxl-unbox's k-sparse SAEs of diffusion models: ``config.json`` beside ``state_dict.pth``.

Layout, bare or under ``state_dict``: ``pre_bias [D]``, ``encoder.weight [F, D]``, ``latent_bias [F]``,
``decoder.weight [D, F]``; ``config.json`` has ``n_dirs_local`` (F), ``d_model`` (D) and ``k``. The bias is subtracted
and added again, ReLU after the k largest, no normalisation. It reads what a block of the model adds: its output, less
its input. ``mean.pt`` and ``std.pt`` beside it are statistics of each feature's activations, and no part of the
forward. Source: surkovv/sdxl-unbox, ``hooks/sdxl.py`` and ``app.py``.
"""

from collections.abc import Mapping
from dataclasses import replace

from sae_steer.errors import CheckpointError
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae, MappedFile, read_json
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import check_tensors
from sae_steer.sae.weights import Weights

FAMILY_NAME = "sdxl_unbox"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "state_dict.pth"
_KEYS = {"n_dirs_local", "d_model", "k"}


def recognises(location: Location) -> bool:
    """Whether a place has both files, with these settings."""
    return location.has(WEIGHTS_FILE) and location.config(CONFIG_FILE).keys() >= _KEYS


def open_folder(location: Location) -> FileSae:
    """Opens such a folder; raises :class:`CheckpointError` or one of its subclasses."""
    path = location.folder / WEIGHTS_FILE
    config = Settings(read_json(location.folder / CONFIG_FILE), location.folder / CONFIG_FILE)
    file = _unwrapped(location.open(path))
    tensors = file.tensors
    features, width, k = config.count("n_dirs_local"), config.count("d_model"), config.count("k")
    if k > features:
        raise config.bad("k", f"at most n_dirs_local, {features}")
    wanted = {
        "pre_bias": [width],
        "latent_bias": [features],
        "encoder.weight": [features, width],
        "decoder.weight": [width, features],
    }
    check_tensors(tensors, wanted, path, needed_by=FAMILY_NAME, source=CONFIG_FILE)
    weights = Weights(
        enc=tensors["encoder.weight"],
        dec=tensors["decoder.weight"].T,
        dec_bias=tensors["pre_bias"],
        bias=tensors["latent_bias"],
        subtracts_decoder_bias=True,
    )
    notes: tuple[str, ...] = (
        "it reads and writes what a block of a diffusion model adds (output - input): no site here is that",
    )
    if any((location.folder / name).is_file() for name in ("mean.pt", "std.pt")):
        notes += (
            "mean.pt and std.pt are statistics of features, in units of which its authors edit: they are not read",
        )
    return assemble(
        location.folder,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="topk",
        activation=Activation.TOPK,
        k=k,
        site=None,
        notes=notes,
    )


FAMILY = Family(
    FAMILY_NAME, f"{WEIGHTS_FILE} beside {CONFIG_FILE} with {', '.join(sorted(_KEYS))}", recognises, open_folder
)


def _unwrapped(file: MappedFile) -> MappedFile:
    inner = file.values.get("state_dict")
    if inner is None:
        return file
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{file.path}: state_dict is a {type(inner).__name__}; needed are tensors by name.")
    return replace(file, values=inner)
