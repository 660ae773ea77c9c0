"""A command that cannot do its work says why, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from sae_steer.errors import StartError, SteerError


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the command with status 2 where its body raises an error of ours, also one of a run or of a request."""
    try:
        yield
    except SteerError as error:
        typer.echo(f"sae-steer: {error.message}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def writes(folder: Path) -> Iterator[None]:
    """Around what writes into a folder; raises :class:`StartError` where the system does not let it."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or folder  # the second one is what a file would replace
        raise StartError(f"{where} cannot be written: {error.strerror or type(error).__name__}.") from error


@contextmanager
def imports_of(extra: str) -> Iterator[None]:
    """Around imports that an extra of this package provides for; raises :class:`StartError` where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed. This needs: pip install 'sae-steer[{extra}]'") from error
