"""``sae-steer`` with a sleep of some milliseconds in the edit: ``slowed_server.py MILLISECONDS serve demo ...``."""

import sys
import time
from typing import Any

from sae_steer import edit_layer
from sae_steer_cli.cli import app

_edit = edit_layer.feature_edit
_seconds = float(sys.argv.pop(1)) / 1000


def slowed(*arguments: Any, **keywords: Any) -> None:
    """The edit, and a sleep."""
    time.sleep(_seconds)
    _edit(*arguments, **keywords)


edit_layer.feature_edit = slowed
app()
