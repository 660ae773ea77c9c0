"""``sae-steer`` with a sleep of some milliseconds in the edit: ``slowed_server.py MILLISECONDS serve demo ...``."""

import sys
import time
from typing import Any

from sae_steer.edit_layer import EditLayer
from sae_steer_cli.cli import app

_edit = EditLayer._edit
_seconds = float(sys.argv.pop(1)) / 1000


def slowed(self: EditLayer, *arguments: Any) -> None:
    """The edit at a site, and a sleep."""
    time.sleep(_seconds)
    _edit(self, *arguments)


EditLayer._edit = slowed  # type: ignore[method-assign]
app()
