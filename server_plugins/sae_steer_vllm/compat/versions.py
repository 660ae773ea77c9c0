"""Which vLLM this is, and whether an engine's configuration names the plugin."""

import re
from typing import Any

import vllm

from sae_steer.errors import StartError
from sae_steer_vllm.config import PluginConfig, config_of

TESTED = ((0, 26), (0, 32))
"""First and last minor release that the plugin was made for."""

MINE = "_sae_steer"
"""Attribute under which vLLM's objects hold the plugin's parts."""

MISSING: list[str] = []
"""What is wrapped and not there: engines that do not steer run without it, others are refused."""


def version() -> tuple[int, int]:
    """Major and minor number of the running vLLM; zeros where it was built without one."""
    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def configured(vllm_config: Any) -> PluginConfig | None:
    """The plugin's configuration of an engine; None where it has none.

    Raises:
        StartError: It cannot be used, with this version of vLLM or with the rest of the engine's configuration.
    """
    config = config_of(vllm_config.additional_config)
    if config is None:
        return None
    if not TESTED[0] <= version() <= TESTED[1] and not config.allow_untested_vllm:
        first, last = (".".join(map(str, v)) for v in TESTED)
        raise StartError(
            f"This is vLLM {vllm.__version__}, and the plugin was made for {first} to {last}. Install one of those, or "
            'say "allow_untested_vllm": true in its configuration and run `sae-steer selftest` before you rely on it.'
        )
    if MISSING:
        raise StartError(f"This vLLM ({vllm.__version__}) has no {', '.join(MISSING)}, which steering needs.")
    return config
