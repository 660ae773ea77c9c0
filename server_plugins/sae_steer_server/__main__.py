"""``python -m sae_steer_server`` is ``sae-steer``."""

from sae_steer_server.cli import main

main()
