"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors`` in a folder that is named for its hookpoint.

Layout: ``encoder.weight [F, D]``, ``encoder.bias [F]``, ``W_dec [F, D]``, ``b_dec [D]``, with a skip connection also
``W_skip [D, D]``. ReLU, then the k largest. ``num_latents`` 0 stands for ``d_in * expansion_factor``. ``b_dec`` is
subtracted from the input of autoencoders, and not of transcoders whose ``cfg.json`` says ``transcode``: before February
2025 transcoders subtracted it too, and only the run's own ``config.json``, one folder up, said that they were any.
Source: EleutherAI/sparsify, ``sparsify/sparse_coder.py`` and its pull request 49.
"""

import re
from collections.abc import Mapping

from sae_steer.errors import CheckpointError
from sae_steer.sae.assemble import assemble
from sae_steer.sae.files import FileSae, read_json
from sae_steer.sae.location import Location
from sae_steer.sae.record import Activation
from sae_steer.sae.registry import Family
from sae_steer.sae.settings import Settings
from sae_steer.sae.tensors import fit_shapes
from sae_steer.sae.weights import Weights
from sae_steer.sites import Kind, Place, Site

FAMILY_NAME = "sparsify"
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
_HOOKPOINT = re.compile(
    r"(?:model\.|transformer\.|gpt_neox\.)*(?:layers|h)\.(?P<layer>\d{1,5})"
    r"(?:\.(?P<module>mlp|self_attn|attn|attention))?"
)
_NORMED_OUTPUTS = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)
_COUPLED = ("batch_topk", "sample_topk", "input_unit_norm")  # of a fork, SAeUron


def recognises(location: Location) -> bool:
    """Whether a folder holds both files."""
    return location.has(CONFIG_FILE, WEIGHTS_FILE)


def open_folder(location: Location) -> FileSae:
    """Opens one hookpoint's folder; raises :class:`CheckpointError` or one of its subclasses."""
    config = Settings(read_json(location.folder / CONFIG_FILE), location.folder / CONFIG_FILE)
    path = location.folder / WEIGHTS_FILE
    file = location.open(path)
    tensors = file.tensors
    _refuse_others(config)
    width = config.count("d_in")
    stated, k = config.values.get("num_latents", 0), config.count("k")
    features = config.count("num_latents") if stated != 0 else width * config.count("expansion_factor")
    if k > features:
        raise config.bad("k", f"at most the number of latents, {features}")
    subtracts, skip = not config.flag("transcode", False), config.flag("skip_connection", False)
    if skip != ("W_skip" in tensors):
        raise CheckpointError(
            f"{path} {'lacks' if skip else 'holds'} W_skip, and {CONFIG_FILE} says skip_connection is {skip}."
        )
    layout = {"encoder.bias": "F", "encoder.weight": "F D", "W_dec": "F D", "b_dec": "D"}
    if skip:
        layout["W_skip"] = "D D"
    known = {"F": features, "D": width}
    fit_shapes(tensors, layout, path, needed_by=FAMILY_NAME, known=known, source=CONFIG_FILE)
    weights = Weights(
        enc=tensors["encoder.weight"],
        dec=tensors["W_dec"],
        dec_bias=tensors["b_dec"],
        bias=tensors["encoder.bias"],
        subtracts_decoder_bias=subtracts,
    )
    model, transcoder = _run(location, not subtracts)
    hookpoint = location.folder.absolute().name
    if skip and not transcoder and "transcode" not in config.values:
        site, why = None, "it may be a transcoder of before February 2025, or not: name its site"
    else:
        site, why = _site(hookpoint, model, transcoder)
    old = "a transcoder of before February 2025: it subtracts b_dec, though that lives at its output"
    return assemble(
        location.folder,
        (file,),
        weights,
        family=FAMILY_NAME,
        architecture="topk" + (" transcoder" if transcoder else "") + (" with skip connection" if skip else ""),
        activation=Activation.TOPK,
        site=site,
        k=k,
        model_name=model,
        skip=skip,
        notes=((why,) if why else ()) + ((old,) if transcoder and subtracts else ()),
    )


FAMILY = Family(FAMILY_NAME, f"{CONFIG_FILE} and {WEIGHTS_FILE}", recognises, open_folder)


def _refuse_others(config: Settings) -> None:
    activation = config.text("activation") or "topk"
    if activation == "groupmax":
        raise config.refusal(
            "activation", "a feature is active where it is the largest of its group, and ranks here are of the whole"
        )
    if activation != "topk":
        raise config.refusal("activation", "known is topk")
    if config.flag("signed", False):
        raise config.refusal("signed", "its activations are signed and ranked by size")
    for key in _COUPLED:
        if config.values.get(key):
            raise config.refusal(key, "it ties a token's activations to those of others, or normalises in its own way")


def _run(location: Location, transcoder: bool) -> tuple[str | None, bool]:
    """The model, and whether it was a run of transcoders, by the run's configuration one folder up, where that is."""
    above: Mapping[str, object] = Location(location.folder.absolute().parent).config("config.json")
    model = above.get("model")
    return model if isinstance(model, str) else None, transcoder or above.get("transcode") is True


def _site(hookpoint: str, model: str | None, transcoder: bool) -> tuple[Site | None, str]:
    """The site of a hookpoint, or None and the reason."""
    match = _HOOKPOINT.fullmatch(hookpoint)
    if match is None:
        return None, f"its folder {hookpoint!r} is not a hookpoint this program knows: name its site"
    layer, module = int(match["layer"]), match["module"]
    if module is None:
        write = Place(Kind.RESID_POST, layer)
        return Site(Place(Kind.RESID_PRE, layer) if transcoder else write, write), ""
    if model is None or _NORMED_OUTPUTS.search(model):
        return None, (
            f"{hookpoint} is the module's output, which some models (Gemma 2 and 3) normalise before they add it; "
            f"the model is {model or 'not stated'}: name its site"
        )
    if module != "mlp" and transcoder:
        return None, f"a transcoder of {hookpoint} reads what is no site here: name its site"
    write = Place(Kind.MLP_OUT if module == "mlp" else Kind.ATTN_OUT, layer)
    return Site(Place(Kind.MLP_IN, layer) if transcoder else write, write), ""
