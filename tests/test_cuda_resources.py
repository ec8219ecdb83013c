"""What the CUDA kernels take of a multiprocessor: those that keep weights in registers spill none.

The build (`make cuda`) hands its report to the same program. Here it reads reports written down,
and, where there is a CUDA compiler, that of the weight-resident kernels, compiled for sm_90a.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "cuda"))

import resources  # noqa: E402

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastrnn4step' for 'sm_90a'
ptxas info    : Function properties for _ZN7fastrnn4step
    16 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 8448 bytes smem
ptxas info    : Compiling entry function '_ZN7fastrnn10persistent3gruE' for 'sm_80'
ptxas info    : Function properties for _ZN7fastrnn10persistent3gruE
    {frame} bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_every_kernel_of_a_report_is_read() -> None:
    step, resident = resources.parse(REPORT.format(frame=0, spill=0))
    assert step == resources.Kernel("_ZN7fastrnn4step", "sm_90a", 64, 8448, 16, 28, 24)
    assert (resident.architecture, resident.registers, resident.shared) == ("sm_80", 255, 0)
    assert not step.weight_resident
    assert resident.weight_resident


@pytest.mark.parametrize(("frame", "spill", "code"), [(0, 0, 0), (8, 0, 1), (0, 4, 1)])
def test_a_weight_resident_kernel_that_spills_is_an_error(
    tmp_path: Path, frame: int, spill: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.txt"
    report.write_text(REPORT.format(frame=frame, spill=spill))
    assert resources.main([str(report)]) == code
    assert ("error: _ZN7fastrnn10persistent3gruE on sm_80" in capsys.readouterr().err) == bool(code)


@pytest.mark.virtual_device
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_weight_resident_kernels_keep_their_weights(cell: str, tmp_path: Path) -> None:
    """With bfloat16 operands: a unit takes half a minute to compile."""
    unit = ROOT / "cuda" / "persistent" / f"{cell}_bf16.cu"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    command = [nvcc, "-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-cubin"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'cuda'}"]
    command += [str(unit), "-o", str(tmp_path / "unit.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = resources.parse(done.stderr)
    assert any(kernel.weight_resident for kernel in kernels)
    assert [kernel.line() for kernel in kernels if kernel.forbidden] == []
