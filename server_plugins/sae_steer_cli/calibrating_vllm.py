"""``sae-steer calibrate --engine vllm``: the same texts, through vLLM's own engine in this process."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from sae_steer.calibration.model import of_source
from sae_steer.calibration.observe import Observing, Tokeniser
from sae_steer.errors import DataError, StartError
from sae_steer_cli.models import NamedSae, location_of
from sae_steer_cli.refusal import imports_of
from sae_steer_server.settings import DType

MODULE = "sae_steer_vllm.compat.calibration"
"""Named, not imported: the command is used where vLLM is not installed, and knows of it only that it runs texts."""


def vllm_engine(
    model: str,
    engine_args: str,
    dtype: DType,
    observing: Observing,
    named: NamedSae,
    labels: Sequence[str],
    limit: int,
) -> tuple[Any, Observing, str]:
    """Starts vLLM with the SAE; the harvester, with the tokens of a text that it takes, and the model's fingerprint.

    Raises:
        StartError: vLLM is not installed, its options cannot be used, or it does not start with the SAE.
    """
    from transformers import AutoConfig, AutoTokenizer

    from sae_steer_vllm.harvest import VllmHarvester, refuse_options

    options = _options(engine_args)
    refuse_options(options)
    place = location_of(model)
    # Before vllm is imported, which reads it once a process.
    os.environ["VLLM_PLUGINS"] = ",".join(filter(None, {"sae_steer", *os.environ.get("VLLM_PLUGINS", "").split(",")}))
    with imports_of("vllm"):
        host = import_module(MODULE)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StartError(f"The model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    observing = replace(observing, max_length=_length(observing.max_length, options, config))
    sae = {"name": named.name, "location": str(Path(named.sae.path).absolute()), "site": str(named.site)}
    llm, params = host.offline_engine(
        {
            **options,
            "model": place,
            "dtype": dtype,
            # One token more than is observed: vLLM wants room for the one that it makes.
            "max_model_len": observing.max_length + 1,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "additional_config": {"sae_steer": {"saes": [sae]}},
        }
    )
    fingerprint = of_source(place)
    if fingerprint is None:
        raise StartError(f"The files of {model!r} are not on this machine, so nobody can tell which model it is.")
    tokeniser = Tokeniser(tokenizer, observing, labels)
    harvester = VllmHarvester(llm, params, tokeniser, sae=named.name, labels=len(labels), limit=limit)
    return harvester, observing, fingerprint


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"--engine-args is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise DataError('--engine-args is not a JSON object such as {"tensor_parallel_size": 2}.')
    return found


def _length(wanted: int, options: dict[str, Any], config: Any) -> int:
    """Tokens of a text that are run: one is left of the context for the token that vLLM makes."""
    most = int(options.pop("max_model_len", 0)) or int(getattr(config, "max_position_embeddings", 0))
    if not most and not wanted:
        raise DataError("The model's configuration does not say how long its context is. Say it with --max-length.")
    if wanted and most and wanted > most - 1:
        raise DataError(f"--max-length {wanted} is more than vLLM takes of a context of {most}: {most - 1}.")
    return wanted or most - 1
