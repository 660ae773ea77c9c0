"""How many choices may run or wait at once: the only number that HTTP itself limits."""

from collections.abc import Iterator
from contextlib import contextmanager

from sae_steer.errors import Busy, LimitExceeded
from sae_steer_server.metrics import Metrics


class Concurrency:
    """Counts the choices in flight. Lives on the event loop's thread; needs no lock.

    Args:
        limit: The most choices at once.
        metrics: Is told of every change.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self.running = 0
        self._metrics = metrics

    @contextmanager
    def hold(self, choices: int) -> Iterator[None]:
        """Counts ``choices`` while they run.

        Raises:
            LimitExceeded: The request alone asks for more than ever fits.
            Busy: They do not fit now.
        """
        if choices > self.limit:
            raise LimitExceeded(
                f"This request asks for {choices} choices, and the server generates at most {self.limit} at once. "
                "Lower 'n' or send fewer prompts.",
                param="n",
            )
        if self.running + choices > self.limit:
            raise Busy(
                f"The server is generating {self.running} choices of at most {self.limit}. Try again in a second."
            )
        self._change(choices)
        try:
            yield
        finally:
            self._change(-choices)

    def _change(self, by: int) -> None:
        self.running += by
        self._metrics.choices(self.running)
