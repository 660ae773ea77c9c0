"""The command ``sae-steer``, also as ``python -m sae_steer_cli``."""

import sys


def main() -> None:
    """Runs the command line, or says what must be installed for it."""
    try:
        from sae_steer_cli import cli
    except ModuleNotFoundError as error:
        sys.exit(f"sae-steer: {error.name} is not installed. The command needs: pip install 'sae-steer[server]'")
    cli.main()


if __name__ == "__main__":
    main()
