"""Deploy a tagger into a C++ process without Python: torch.export, AOTInductor, a C++ program.

`fastrnn.decompositions` lowers the layer to torch's own operators, torch's AOTInductor compiles the
graph into a package, and `inductor.cpp` loads the package with libtorch and runs it, for another
number of rows than that of the export. Both compilations take about half a minute.

    python examples/inductor.py

It needs a C++ compiler (CXX, by default c++). Exit code 1 if the program's results differ from the
layer's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

import fastrnn
from common import verdict

STEPS, ROWS = 20, 4  # of the program's input; the export's has 3 rows


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.tag = fastrnn.LSTM(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tag(self.encode(x)[0])


@torch.no_grad()
def compile_package(model: nn.Module, path: Path) -> Path:
    """Export the model for any number of rows, and compile it."""
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        model.eval(), (torch.randn(STEPS, 3, 8),), dynamic_shapes=({1: rows},)
    )
    table = torch.export.default_decompositions()
    table.update(fastrnn.decompositions())
    program = program.run_decompositions(table)  # only torch's operators, the steps unrolled
    return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))


def compile_program(path: Path) -> Path:
    """Compile inductor.cpp against the libtorch of the installed torch."""
    source, libraries = Path(__file__).with_name("inductor.cpp"), cpp_extension.library_paths()[0]
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", *includes, source, "-o", path, *links], check=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a layer in a C++ process.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="the folder to write to")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Tagger()
    package = compile_package(model, folder / "tagger.pt2")
    program = compile_program(folder / "tagger")

    done = subprocess.run([program, package, str(ROWS)], capture_output=True, text=True, check=True)
    found = torch.tensor([float(line) for line in done.stdout.split()])
    x = torch.arange(STEPS * ROWS * 8).sin().reshape(STEPS, ROWS, 8)
    apart = (model(x).flatten() - found).abs().max().item()
    print(f"package: {package}, {package.stat().st_size / 1e6:.1f} MB; program: {program}")
    print(f"{len(found)} values from the C++ process; largest difference {apart:.1e}")
    return verdict(
        apart < 1e-5,
        "the C++ process gives other values",
        "the program has no Python in it, and gives the layer's values up to rounding.",
    )


if __name__ == "__main__":
    sys.exit(main())
