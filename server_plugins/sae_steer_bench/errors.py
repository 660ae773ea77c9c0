"""What ends a measurement."""

from sae_steer.errors import StartError, SteerError


class BenchError(StartError):
    """The measurement cannot be begun, or cannot be resumed."""

    code = "cannot_measure"


class LoadFailed(SteerError):
    """Requests under load were not answered: the rounds before it stay valid."""

    code = "load_failed"


def words_of(error: OSError) -> str:
    """What the system says, and of which file."""
    said = error.strerror or str(error) or type(error).__name__
    return said if error.filename is None else f"{said} ({error.filename})"
