"""A command that cannot do its work says why, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sae_steer.errors import StartError


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the command with status 2 where its body raises :class:`StartError`."""
    try:
        yield
    except StartError as error:
        typer.echo(f"sae-steer: {error.message}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def imports_of(extra: str) -> Iterator[None]:
    """Around imports that an extra of this package provides for; raises :class:`StartError` where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed. This needs: pip install 'sae-steer[{extra}]'") from error
