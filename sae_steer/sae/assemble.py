"""The record of a family whose files hold nothing but plain weights."""

from pathlib import Path

from torch import Tensor

from sae_steer.sae.files import FileSae, MappedFile
from sae_steer.sae.record import DECODER_NORM_UNITS, RAW_UNITS, Activation, InputNorm, SaeSpec
from sae_steer.sae.tensors import DTYPES
from sae_steer.sae.weights import Weights
from sae_steer.sites import Site

NO_SITE = "the files do not say where the SAE belongs: name its site"


def assemble(
    path: Path,
    files: tuple[MappedFile, ...],
    weights: Weights,
    *,
    family: str,
    architecture: str,
    activation: Activation,
    site: Site | None,
    k: int | None = None,
    input_norm: InputNorm = InputNorm.NONE,
    model_name: str | None = None,
    skip: bool = False,
    notes: tuple[str, ...] = (),
    topk_threshold: Tensor | None = None,
    parameters: tuple[float, ...] = (),
) -> FileSae:
    """An SAE whose widths and dtype are those of its weights, which fit together; arguments as in :class:`SaeSpec`.

    ``parameters`` are what a configuration says beside that; the scales of the weights are added to them.
    What the weights fold is noted; so is a site that is missing, where ``notes`` do not say why.
    """
    if site is None and not any("site" in note for note in notes):
        notes = (*notes, NO_SITE)
    if weights.subtracts_decoder_bias:
        notes = (*notes, "b_dec is subtracted from the input: folded into the encoder bias")
    if skip:
        notes = (*notes, "W_skip is part of the reconstruction only: an edit's delta does not involve it")
    n_features, d_in = weights.enc.shape
    spec = SaeSpec(
        family=family,
        architecture=architecture,
        activation=activation,
        n_features=n_features,
        d_in=d_in,
        d_out=weights.dec.shape[1],
        input_norm=input_norm,
        subtracts_decoder_bias=weights.subtracts_decoder_bias,
        k=k,
        site=site,
        model_name=model_name,
        dtype=DTYPES[weights.enc.dtype],
        value_convention=DECODER_NORM_UNITS if weights.decoder_norm_units else RAW_UNITS,
        notes=notes,
        skip=skip,
    )
    scales = (weights.enc_scale, weights.dec_scale, float(weights.theta_of_scaled))
    if scales != (1.0, 1.0, 0.0):
        parameters += scales
    return FileSae(spec, path, weights, files, topk_threshold=topk_threshold, parameters=parameters)
