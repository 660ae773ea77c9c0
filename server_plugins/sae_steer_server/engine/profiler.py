"""PyTorch's profiler around one forward pass of the running batch."""

import logging
from pathlib import Path

from torch.profiler import profile

from sae_steer.errors import StartError

SKIPPED = 8
"""Forward passes let by before the one that is traced: those of the prompts are behind it then."""

logger = logging.getLogger(__name__)


class StepProfiler:
    """Traces a forward pass, from its beginning to that of the next, and so with the choice of its tokens.

    Args:
        folder: Where traces are written, as Chrome's JSON.

    Raises:
        StartError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left: int | None = None  # forward passes to let by; None = no trace is wanted
        self._running: profile | None = None
        self._last: Path | None = None
        self._number = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"--profile-dir {folder}: {error.strerror or error}.") from None

    def arm(self) -> None:
        """Wants a trace, from any thread."""
        self._last, self._left = None, SKIPPED

    def disarm(self) -> Path | None:
        """Wants none any more; the one that was written since :meth:`arm`, if it was. From any thread."""
        self._left = None
        return self._last

    def tick(self) -> None:
        """A forward pass begins: in the engine's thread, which is the one that is traced."""
        if self._running is not None:
            running, self._running = self._running, None
            running.stop()
            self._number += 1
            path = self._folder / f"step-{self._number}.pt.trace.json"
            running.export_chrome_trace(str(path))
            logger.info("wrote a trace of one forward pass: %s", path)
            self._last = path
        if self._left is None:
            return
        if self._left > 0:
            self._left -= 1
            return
        self._left = None
        self._running = profile(record_shapes=True)
        self._running.start()
