"""What the compiler made of a kernel: registers of a thread, and bytes of them that did not fit and went to memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

AMD = ("vgpr_count", "vgpr_spill_count")


class Usage(NamedTuple):
    registers: int
    spilled_bytes: int


def nvidia(cubin: bytes) -> Usage:
    """Read with the tool that comes inside Triton's wheel. Spilled registers live in the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Usage(registers, stack + local)


def amd(assembly: str) -> Usage:
    """Read from the kernel's metadata, where a spilled vector register is 4 bytes a lane."""
    registers, spilled = (int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in AMD)
    return Usage(registers, 4 * spilled)
