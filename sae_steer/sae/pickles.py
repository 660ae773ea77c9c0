"""Recognises pickles by their bytes and refuses them, by the names that they would import. Nothing here loads one."""

import io
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_steer.errors import CheckpointError, UnsafeCheckpoint

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
# What zipfile raises for archives that are cut short or damaged.
BROKEN_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, struct.error, zlib.error)
_ZIP = b"PK\x03\x04"  # torch.save since 1.6: a zip archive around data.pkl
_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")  # the second byte, since protocol 2
_EXAMINED = 2**20  # bytes of a pickle that are looked at: enough for every object graph, and no more
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_MEMOS = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")


def refuse_pickle(path: Path) -> None:
    """Raises :class:`UnsafeCheckpoint` where the bytes, or else the name, are those of a pickle.

    Raises:
        UnsafeCheckpoint: With the callables that loading the file would look up, as far as they are found.
        CheckpointError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_EXAMINED)
        content = _inner_pickle(path) if head.startswith(_ZIP) else head
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not is_pickle(head) and path.suffix.lower() not in PICKLE_SUFFIXES:
        return
    raise UnsafeCheckpoint(not_loaded(path, sorted(set(pickled_globals(content)))))


def not_loaded(path: Path, names: Sequence[str]) -> str:
    """The message for a pickle that is refused, with the first of the names that it would import."""
    found = f" (this one looks up {', '.join(names[:8])})" if names else ""
    return (
        f"{path} is a pickle, and loading a pickle runs whatever code it holds{found}. It was not loaded. "
        "Use the safetensors form of this SAE, or convert it where that cannot do harm."
    )


def is_pickle(head: bytes) -> bool:
    """Whether a file's first bytes are those of a pickle or of torch's zip archive around one."""
    if head[8:9] == b"{":
        return False  # safetensors: eight bytes of length, which may look like anything, then JSON
    framed = head[:1] == b"\x80" and head[1:2] in _PROTOCOLS
    # Protocols 0 and 1 have no frame; one that could do harm names what it imports.
    return framed or head.startswith(_ZIP) or next(pickled_globals(head), None) is not None


def pickled_globals(content: bytes) -> Iterator[str]:
    """Dotted names that a pickle would import, read from its opcodes; what cannot be told apart is left out."""
    stream = io.BytesIO(content)
    strings: list[str] = []  # pushed by the opcodes just before, with nothing in between but memos
    try:
        while stream.tell() < len(content):  # torch.save before 1.6 wrote several pickles, one after another
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in {"GLOBAL", "INST"}:
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    yield ".".join(strings[-2:])
                if opcode.name in _STRINGS:
                    strings.append(str(argument))
                elif opcode.name not in _MEMOS:
                    strings.clear()
    except ValueError:
        return  # the end of what was examined, or of what is a pickle


def _inner_pickle(path: Path) -> bytes:
    """The start of ``data.pkl`` in torch's zip archive; empty where there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return b""
            with archive.open(name) as file:
                return file.read(_EXAMINED)
    except BROKEN_ARCHIVE:
        return b""
