"""What ends a measurement."""

from sae_steer.errors import StartError, SteerError


class BenchError(StartError):
    """The measurement cannot be begun, or cannot be resumed."""

    code = "cannot_measure"


class LoadFailed(SteerError):
    """Requests under load were not answered: the rounds before it stay valid."""

    code = "load_failed"
