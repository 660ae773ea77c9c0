"""Compiles the very launches of an implementation for GPUs that are not there, and reads the machine code.

Inside :func:`compiling` a kernel launch compiles for the named target and does nothing else: no driver, no device. The
launch keeps its own grid, options and specialisation, so that what is looked at is what would run.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

# Each target and the shared memory that a program may take there, which compiling does not check. In bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # ships in Triton's wheel


@dataclass(frozen=True, slots=True)
class Machine:
    """A kernel as a target would run it.

    Args:
        kernel: Name of the kernel.
        target: A key of ``TARGETS``.
        options: ``num_warps``, ``num_stages`` and the constants it was compiled for, by name.
        registers: Of one thread; vector registers on AMD.
        spilled: Registers or bytes that live in memory for want of registers; 0 is what every kernel here needs.
        shared: Bytes of shared memory of a program.
        text: Disassembly: SASS, or AMD's assembler.
    """

    kernel: str
    target: str
    options: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    text: str

    @classmethod
    def read(cls, compiled: Any, target: str) -> Self:
        """What a ``triton.compiler.CompiledKernel`` became."""
        registers, spilled, text = (_amd if target.startswith("gfx") else _nvidia)(compiled)
        meta = compiled.metadata
        options = {"num_warps": meta.num_warps, "num_stages": meta.num_stages, **_constants(compiled)}
        return cls(compiled.name, target, options, registers, spilled, meta.shared, text)

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression, such as ``LDG.E.128`` or ``v_mfma_``."""
        return len(re.findall(pattern, self.text))

    @property
    def float_atomics(self) -> int:
        """Atomic additions of floating-point numbers, whose order would show in the result."""
        return self.count(r"\b(?:RED|ATOM)[A-Z]*\.[A-Z0-9.]*F(?:16|32|64|TZ)|_atomic_(?:pk_)?add_[bf]")

    @property
    def row(self) -> str:
        """One line of a table: kernel, target, warps, registers, spills, shared memory."""
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        size = f"{warps} warps, {stages} stages"
        return f"{self.kernel} | {self.target} | {size} | {self.registers} | {self.spilled} | {self.shared}"

    def check(self, *, registers: int = 255) -> None:
        """Fails where the kernel spills, adds floats atomically, or asks for more than the target has."""
        assert self.spilled == 0, self.row
        assert self.registers <= registers, self.row
        assert self.shared <= TARGETS[self.target][1], self.row
        assert self.float_atomics == 0, self.row


def _constants(compiled: Any) -> dict[str, Any]:
    source = compiled.src
    names = source.fn.arg_names
    return {".".join(names[i] for i in path): value for path, value in source.constants.items()}


def _nvidia(compiled: Any) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([_CUOBJDUMP, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    # A spill is a stack frame, and a load or a store of local memory.
    return registers, stack + local + len(re.findall(r"\b(?:LDL|STL)\b", sass)), sass


def _amd(compiled: Any) -> tuple[int, int, str]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found is not None, name
        return int(found.group(1))

    # Scalar registers are spilled to lanes of vector registers, which is no memory.
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spilled, text


class _Absent(DriverBase):
    """Stands in for a device of a target; each target has a number of its own, under which Triton keeps its kernels.

    Results are Any where the base class, whose methods have no bodies, is taken to return None.
    """

    def __init__(self, target: GPUTarget, number: int) -> None:
        self._target, self._number = target, number

    @classmethod
    def is_active(cls) -> Any:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no device to measure on")

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass


@contextmanager
def compiling(target: str, cache: Path) -> Iterator[list[Machine]]:
    """Every launch inside compiles for ``target``; the list fills with what each became.

    Args:
        target: A key of ``TARGETS``.
        cache: Folder for Triton's compiled files, in place of the user's.
    """
    machines: list[Machine] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        machines.append(Machine.read(compiled, target))
        return compiled

    # Numbers beyond those of real devices: on a machine with a GPU the two must not share kernels.
    absent = _Absent(TARGETS[target][0], 1000 + list(TARGETS).index(target))
    before = driver._active  # None where nothing has asked for a device; asking fails where there is none
    driver.set_active(absent)
    try:
        with mock.patch.object(JITFunction, "run", run), triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(cache)
            yield machines
    finally:
        driver._active = before
