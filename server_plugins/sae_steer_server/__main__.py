"""The command ``sae-steer``, also as ``python -m sae_steer_server``."""

import sys


def main() -> None:
    """Runs the command line, or says what must be installed for it."""
    try:
        from sae_steer_server import cli
    except ModuleNotFoundError as error:
        sys.exit(f"sae-steer: {error.name} is not installed. The server needs: pip install 'sae-steer[server]'")
    cli.main()


if __name__ == "__main__":
    main()
