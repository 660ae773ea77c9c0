"""Files that are there whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in place of what is there, so that nobody ever reads a part of it, also where the machine stops.

    Its mode is what the process' umask leaves of 0666, as of any new file: what one account calibrates, the one that
    serves can read. (:mod:`tempfile` makes files for their owner alone.)

    Args:
        path: The file; its folder must be there. A kill may leave a file ``*.tmp`` beside it.
        content: The bytes.

    Raises:
        OSError: It cannot be written; what was there is untouched.
    """
    temporary = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
