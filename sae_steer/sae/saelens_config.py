"""``cfg.json`` of SAELens: flat before sae-lens 6, then a flat core with the model's side under ``metadata``."""

from collections.abc import Mapping
from pathlib import Path

from sae_steer.errors import SiteError
from sae_steer.sae.hook_points import place_of_module
from sae_steer.sae.lens_hooks import lens_site
from sae_steer.sae.record import DECODER_NORM_UNITS, RAW_UNITS, Activation, InputNorm, SaeSpec
from sae_steer.sae.settings import Settings
from sae_steer.sites import Kind, Site

FAMILY_NAME = "saelens"
_ARCHITECTURES = {
    "standard": Activation.RELU,
    "jumprelu": Activation.JUMPRELU,
    "gated": Activation.GATED,
    "topk": Activation.TOPK,
    "transcoder": Activation.RELU,
    "skip_transcoder": Activation.RELU,
    "jumprelu_transcoder": Activation.JUMPRELU,
    "jumprelu_skip_transcoder": Activation.JUMPRELU,
}
_TRAINING = "it is a training checkpoint, whose activation depends on the batch; save its inference form with sae-lens"
_REFUSED_ARCHITECTURES = {
    "abstopk": "its activations are signed and ranked by size over the whole dictionary, which no op here computes",
    "batchtopk": _TRAINING,
    "matryoshka_batchtopk": _TRAINING,
    "matching_pursuit": "it encodes by an iteration over the whole dictionary, so a feature has no row of its own",
    "temporal": "its activations depend on other positions of the request",
}
_NORMS = {
    "none": InputNorm.NONE,
    "layer_norm": InputNorm.LAYER_NORM,
    "constant_norm_rescale": InputNorm.NORM_RESCALE,
}
SCALED = "expected_average_only_in"
_REFUSED_NORMS = {
    SCALED: "its factor is not in the files; sae-lens' fold_activation_norm_scaling_factor folds it",
    "covariance_whitening": "its matrices are not in the file; sae-lens' fold_activation_whitening folds them",
}
# What `metadata` is read for; the rest of it belongs to training.
_METADATA = {
    "hf_hook_name",
    "hf_hook_name_out",
    "hook_head_index",
    "hook_head_index_out",
    "hook_name",
    "hook_name_out",
    "model_from_pretrained_kwargs",
    "model_name",
}
# TransformerLens can rewrite a model's weights. These rewrites change the tensor itself at these places.
_REWRITES = {
    "fold_ln": {Kind.MLP_IN},
    "fold_value_biases": {Kind.Z},
    "refactor_factored_attn_matrices": {Kind.Z},
}


def parse_config(raw: Mapping[str, object], path: Path, scaled: bool = False) -> SaeSpec:
    """Reads a configuration of any version.

    Args:
        raw: The JSON object.
        path: Where it came from, for messages.
        scaled: Whether the factor of ``expected_average_only_in`` is known, and folded.

    Returns:
        The spec, with the dtype that the configuration claims.

    Raises:
        CheckpointError: A value is missing or of the wrong type.
        UnsupportedCheckpoint: The forward is not one that is computed exactly here.
    """
    config = _flatten(raw, path)
    architecture, activation = _activation(config)
    transcoder = architecture.endswith("transcoder")
    features, d_in = config.count("d_sae"), config.count("d_in")
    k = config.count("k") if activation is Activation.TOPK else None
    if k is not None and k > features:
        raise config.bad("k", f"at most d_sae, {features}")
    decoder_norm_units = activation is Activation.TOPK and config.flag("rescale_acts_by_decoder_norm", False)
    subtracts = config.flag("apply_b_dec_to_input", not transcoder)
    if transcoder and subtracts:
        raise config.refusal("apply_b_dec_to_input", "a transcoder's decoder bias lives at its output")
    site, notes = _site(config, transcoder)
    if scaled and not transcoder:
        config = Settings({**config.values, "normalize_activations": None}, path)
    norm, more = _input_norm(config, site, transcoder)
    notes += more
    if subtracts:
        notes += ("b_dec is subtracted from the input: folded into the encoder bias",)
    if decoder_norm_units:
        notes += ("activations are in units of decoder norms: folded into encoder and decoder",)
    if "skip" in architecture:
        notes += ("W_skip is part of the reconstruction only: an edit's delta does not involve it",)
    return SaeSpec(
        family=FAMILY_NAME,
        architecture=architecture,
        activation=activation,
        n_features=features,
        d_in=d_in,
        d_out=config.count("d_out") if transcoder else d_in,
        input_norm=norm,
        subtracts_decoder_bias=subtracts,
        k=k,
        site=site,
        model_name=config.text("model_name"),
        dtype=(config.text("dtype") or "float32").removeprefix("torch."),
        value_convention=DECODER_NORM_UNITS if decoder_norm_units else RAW_UNITS,
        notes=notes,
        skip="skip" in architecture,
    )


def _flatten(raw: Mapping[str, object], path: Path) -> Settings:
    """One flat mapping under the names of sae-lens 6."""
    old_names = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    values = {old_names.get(key, key): value for key, value in raw.items()}
    metadata = Settings(values, path).table("metadata")
    values |= {key: value for key, value in metadata.items() if key in _METADATA}
    kwargs = Settings(values, path).table("activation_fn_kwargs")
    if "k" in kwargs:
        values.setdefault("k", kwargs["k"])
    if isinstance(values.get("normalize_activations"), bool):  # before sae-lens 3
        values["normalize_activations"] = "expected_average_only_in" if values["normalize_activations"] else "none"
    return Settings(values, path)


def _activation(config: Settings) -> tuple[str, Activation]:
    architecture = config.text("architecture") or "standard"
    function = config.text("activation_fn")
    if architecture in _REFUSED_ARCHITECTURES:
        raise config.refusal("architecture", _REFUSED_ARCHITECTURES[architecture])
    if architecture not in _ARCHITECTURES:
        raise config.refusal("architecture", f"known are {', '.join(_ARCHITECTURES)}")
    match architecture, function:
        case "standard", "topk":
            return "topk", Activation.TOPK
        case "standard", "tanh-relu":
            return architecture, Activation.TANH_RELU
        case ("topk", "topk") | (_, None | "relu"):
            return architecture, _ARCHITECTURES[architecture]
    raise config.refusal(
        "activation_fn", f"with architecture {architecture!r} known are relu, and tanh-relu or topk for standard"
    )


def _site(config: Settings, transcoder: bool) -> tuple[Site | None, tuple[str, ...]]:
    """The site, or None and a note saying why the user has to name it."""
    for key in ("hook_head_index", "hook_head_index_out"):
        if config.values.get(key) is not None:
            raise config.refusal(key, "an SAE of a single attention head has no site here")
    hook, out = config.text("hook_name"), config.text("hook_name_out") if transcoder else None
    reshape = config.text("reshape_activations") or "none"
    if reshape != "none" and not (reshape == "hook_z" and (hook is None or hook.endswith("hook_z"))):
        raise config.refusal("reshape_activations", "known are none, and hook_z for an SAE of attn.hook_z")
    site, notes = lens_site(hook if out is not None or not transcoder else None, out)
    path, path_out = config.text("hf_hook_name"), config.text("hf_hook_name_out") if transcoder else None
    if site is not None or path is None or (transcoder and path_out is None):
        return site, notes
    # Where TransformerLens has no plain name for it, the module's path may be plain.
    try:
        read = place_of_module(path)
        return Site(read, place_of_module(path_out) if path_out is not None else read), ()
    except SiteError:
        return None, notes


def _input_norm(config: Settings, site: Site | None, transcoder: bool) -> tuple[InputNorm, tuple[str, ...]]:
    name = config.text("normalize_activations") or "none"
    if name not in _NORMS:
        raise config.refusal("normalize_activations", _REFUSED_NORMS.get(name, f"known are {', '.join(_NORMS)}"))
    norm = _NORMS[name]
    if transcoder and norm is not InputNorm.NONE:
        raise config.refusal("normalize_activations", "a transcoder's output is not scaled back, so edits would be")
    rewrites = config.table("model_from_pretrained_kwargs")
    kind = site.read.kind if site is not None else None
    for key, kinds in _REWRITES.items():
        if rewrites.get(key) is True and kind in kinds:
            raise config.refusal(
                "model_from_pretrained_kwargs", f"{key} changes {kind} itself, and models here are as published"
            )
    if rewrites.get("center_writing_weights") is not True or kind in {Kind.Z, Kind.MLP_IN}:
        return norm, ()
    match norm:
        case InputNorm.NONE:
            return InputNorm.CENTER, ("center_writing_weights: the mean of x over its width is subtracted",)
        case InputNorm.LAYER_NORM:
            return norm, ("center_writing_weights changes nothing here: layer_norm centres already",)
    raise config.refusal("model_from_pretrained_kwargs", f"centred weights and {name} together are not computed here")
