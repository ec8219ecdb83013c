"""Print the resources of each kernel from the compiler's report, and check for spills.

    nvcc … -Xptxas=-v 2>&1 | python cuda/resources.py          # or: resources.py REPORT

Prints one line for each kernel and architecture that the report names: registers, shared memory,
stack and spills. A kernel whose name contains "persistent" keeps weights in registers for the whole
sequence; there a spill or a stack frame would be read again at every step, so it is an error: the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PERSISTENT = "persistent"


@dataclass
class Kernel:
    """One kernel on one architecture; sizes in bytes."""

    name: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def weight_resident(self) -> bool:
        return PERSISTENT in self.name

    @property
    def forbidden(self) -> bool:
        """Whether the kernel keeps weights in registers but spills or has a stack frame."""
        return self.weight_resident and bool(self.stack or self.spill_stores or self.spill_loads)

    def line(self) -> str:
        spills = f"{self.spill_stores}+{self.spill_loads}"
        return (
            f"{self.architecture:7} {self.registers:4} registers {self.shared:7} shared "
            f"{self.stack:5} stack {spills:>9} spilled  {self.name}"
        )


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(report: str) -> list[Kernel]:
    """The kernels in ptxas's verbose output, in order."""
    kernels: list[Kernel] = []
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(entry[1], entry[2]))
        if not kernels:
            continue
        kernel = kernels[-1]
        if frame := _FRAME.search(line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, frame.groups())
        if registers := _REGISTERS.search(line):
            kernel.registers = int(registers[1])
        if shared := _SHARED.search(line):
            kernel.shared = int(shared[1])
    return kernels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", nargs="?", type=Path, help="a file; default: standard input")
    given = parser.parse_args(arguments)
    text = sys.stdin.read() if given.report is None else given.report.read_text("utf-8")
    kernels = parse(text)
    for kernel in kernels:
        print(kernel.line())
    forbidden = [kernel for kernel in kernels if kernel.forbidden]
    for kernel in forbidden:
        print(
            f"error: {kernel.name} on {kernel.architecture} keeps weights in registers, but "
            f"spills or has a stack frame",
            file=sys.stderr,
        )
    return 1 if forbidden else 0


if __name__ == "__main__":
    sys.exit(main())
