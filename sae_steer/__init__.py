"""Per-request sparse-autoencoder interventions inside inference servers.

The names below are the public surface. Importing this package imports neither torch nor transformers until one of them
is used, because plugin loaders import it in processes that never steer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_steer.errors import SteerError as SteerError
    from sae_steer.inprocess import Rows as Rows
    from sae_steer.inprocess import Steer as Steer
    from sae_steer.inprocess import attach as attach
    from sae_steer.limits import Limits as Limits
    from sae_steer.sae import open_sae as open_sae
    from sae_steer.schema import steering_json_schema as steering_json_schema

__version__ = "0.1.0"

_PUBLIC = {
    "Limits": "sae_steer.limits",
    "Rows": "sae_steer.inprocess",
    "Steer": "sae_steer.inprocess",
    "SteerError": "sae_steer.errors",
    "attach": "sae_steer.inprocess",
    "open_sae": "sae_steer.sae",
    "steering_json_schema": "sae_steer.schema",
}
__all__ = ["Limits", "Rows", "Steer", "SteerError", "attach", "open_sae", "steering_json_schema"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
