"""Triton kernels compiled for an H100 (compute capability 9.0), without one: shared memory,
registers and spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H100 = GPUTarget("cuda", 90, 32)
MOST_SHARED = 232_448
"""Bytes of shared memory that a block of threads may have on an H100."""
MOST_REGISTERS = 255


class Compiled(NamedTuple):
    """What a kernel needs of the device."""

    shared: int
    """Bytes of shared memory."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of registers that did not fit and are kept in memory."""

    def faults(self) -> list[str]:
        """Why the kernel cannot run on an H100, or runs badly."""
        faults = []
        if self.shared > MOST_SHARED:
            faults.append(f"{self.shared} bytes of shared memory, at most {MOST_SHARED}")
        if self.registers > MOST_REGISTERS:
            faults.append(f"{self.registers} registers, at most {MOST_REGISTERS}")
        if self.spilled:
            faults.append(f"{self.spilled} bytes of registers spilled")
        return faults


def compile_kernel(kernel: Any, signature: dict[str, str], **constants: Any) -> Compiled:
    """Compile `kernel` to machine code. `signature` has the types of arguments as Triton writes
    them, `constants` the values of the others, and num_warps and num_stages."""
    options = {x: constants.pop(x) for x in ("num_warps", "num_stages") if x in constants}
    types = {x: signature.get(x, "constexpr") for x in kernel.arg_names}
    # torch's tensors begin at multiples of 16 bytes, and Triton compiles for that
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(kernel.arg_names)
        if types[x].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=H100, options=options)
    return assembled(binary.asm["ptx"], binary.metadata.shared)


def assembled(ptx: str, shared: int) -> Compiled:
    """What the assembler says of a kernel; `shared` bytes are given to it at its launch."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(assembler), "-v", "--gpu-name=sm_90a", str(path), "-o", f"{folder}/kernel.o"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(x) for x in re.findall(r"Used (\d+) registers", report))
    spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill stores", report))
    return Compiled(shared, registers, spilled)
