"""Steering in ``vllm.LLM``: the same field, in the same form, and what it did.

>>> from vllm import LLM, SamplingParams
>>> from sae_steer_vllm.offline import additional_config, reports, steered
>>> llm = LLM("google/gemma-2-2b", additional_config=additional_config("steer.json"))
>>> ask = {"interventions": [{"sae": "res12", "features": [4021], "op": "clamp", "value": 8.0}]}
>>> [output] = llm.generate("Once", SamplingParams(extra_args=steered(ask)))
>>> reports(output)[0]["applied"]["fired"]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_steer.errors import RunFailed
from sae_steer.schema import Steering, parse_steering
from sae_steer_vllm.channel import ASK
from sae_steer_vllm.config import KEY, PluginConfig, read_file


class SteeringFailed(RunFailed):
    """A choice was ended rather than steered otherwise than asked."""


def additional_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The ``additional_config`` of an engine, from a configuration file or the same as an object.

    Raises:
        StartError: The file cannot be used.
        pydantic.ValidationError: The object is not of the configuration's form.
    """
    if isinstance(source, Mapping):
        return {KEY: PluginConfig.model_validate(dict(source)).model_dump(mode="json")}
    path = Path(source).resolve()
    return {KEY: {"file": str(path), "digest": read_file(path)[1]}}


def steered(steering: Mapping[str, Any] | Steering, extra_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``extra_args`` of ``SamplingParams`` for a steered request.

    Args:
        steering: The field ``steering``; what it names is checked when the request enters the engine.
        extra_args: Others, beside it.

    Raises:
        SchemaError: The field does not have the published form.
    """
    value = steering if isinstance(steering, Steering) else parse_steering(dict(steering))
    return {**(extra_args or {}), ASK: value.model_dump_json(exclude_unset=True)}


def reports(output: Any) -> list[dict[str, Any] | None]:
    """What was done to each choice of a ``RequestOutput``; None for one that nobody steered or that has not ended.

    Raises:
        SteeringFailed: A choice was ended with an error.
    """
    found: list[dict[str, Any] | None] = []
    for choice in output.outputs:
        block = getattr(choice, "steering", None)
        if block is not None and "error" in block:
            raise SteeringFailed(f"{block['error']['code']}: {block['error']['message']}")
        found.append(block)
    return found
