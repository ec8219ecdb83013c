"""The accuracy of fastrnn and of torch.nn, side by side, against torch.nn in float64.

    python benchmarks/accuracy.py                        print the tables, a minute per dtype
    python benchmarks/accuracy.py --dtype float32        some dtypes
    python benchmarks/accuracy.py --write                also write docs/accuracy.md

For each case both libraries compute with the same weights and inputs in the case's dtype, and
torch.nn computes with the same values in float64. The error of an array is the root mean square of
its difference from float64, relative to that of its values. The tables show fastrnn's error divided
by torch's: geometric means over groups of cases. Below 1, fastrnn is more accurate.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

import torch

import fastrnn
from fastrnn.bench.cases import CELLS, Case
from fastrnn.bench.data import Data, make_data
from fastrnn.bench.providers import Fastrnn, Torch
from fastrnn.bench.report import Table
from fastrnn.info import info

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
DTYPES = ("float32", "bfloat16", "float16")
# T, B, I, H: a step, short and long sequences, many rows, narrow and wide layers.
SIZES = ((1, 8, 32, 32), (20, 64, 16, 20), (20, 8, 64, 128), (100, 4, 32, 64), (1000, 2, 16, 32),
         (50, 2, 256, 512))  # fmt: skip
SCALES = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0)  # of weights and biases U(±1/√H)
# The tables' columns: the names of arrays, without the layer's suffix.
GROUPS = {
    "output": ("output",),
    "h_n, c_n": ("h_n", "c_n"),
    "d input": ("d_input",),
    "d h_0, c_0": ("d_h0", "d_c0"),
    "d W_ih": ("d_weight_ih",),
    "d W_hh": ("d_weight_hh",),
    "d biases": ("d_bias_ih", "d_bias_hh"),
}

CAUSES = """\
## Where float32 is above 1

- The gradients of the weights are sums over all steps and rows, in blocks of 256, one term after
  the other within a block. torch adds the sum of each step; with few rows its chains are shorter.
- fastrnn's tanh has a mean error of 0.32 to 0.60 units in the last place, torch's 0.29.

Each step's recurrent product is summed from zero before the projection of the input is added, as in
torch. When the sum started from the projection, every addition rounded a number as large as the
whole: the outputs of LSTM, GRU and RNN had 1.29, 1.00 and 1.53 times torch's error.

A half type rounds inputs and outputs far more coarsely than any of these."""


@dataclass(frozen=True)
class Error:
    """The error of one array of one case, relative to the root mean square of its values."""

    case: Case
    scale: float
    array: str
    ours: float
    torchs: float

    @property
    def ratio(self) -> float | None:
        """None where an error is zero or not finite (gradients may overflow)."""
        if not (self.ours > 0 and self.torchs > 0 and math.isfinite(self.ours / self.torchs)):
            return None
        return self.ours / self.torchs


def measure(case: Case, scale: float) -> list[Error]:
    """The errors of the outputs in inference, and of every gradient in training."""
    drawn = make_data(case, "cpu")
    data = replace(drawn, weights=[w * scale for w in drawn.weights])
    found = []
    for pass_ in ("inference", "training"):
        exact = Torch().prepare(replace(case, dtype="float64"), _double(data), pass_).results()
        ours = Fastrnn().prepare(case, data, pass_).results()
        theirs = Torch().prepare(case, data, pass_).results()
        for name, values in exact.items():
            if name.startswith("d_") != (pass_ == "training") or name.endswith("with d_h_n"):
                continue
            array = name.removesuffix("_l0")
            errors = _error(ours[name], values), _error(theirs[name], values)
            found.append(Error(case, scale, array, *errors))
    return found


def _double(data: Data) -> Data:
    return Data(
        inputs=[x.double() for x in data.inputs],
        hx=tuple(h.double() for h in data.hx),
        weights=[w.double() for w in data.weights],
        d_output=data.d_output.double(),
    )


def _error(values: Tensor, exact: Tensor) -> float:
    difference = (values.double() - exact).square().mean().sqrt()
    return float(difference / exact.square().mean().sqrt())


def mean_ratio(errors: Iterable[Error]) -> float:
    """The geometric mean of ours / torch's; NaN if there is no ratio."""
    ratios = [e.ratio for e in errors if e.ratio is not None]
    return geometric_mean(ratios) if ratios else math.nan


def by_array(errors: Sequence[Error], dtype: str) -> Table:
    """For each cell of a dtype, the mean of each group of arrays, over all sizes and scales."""
    rows = []
    for cell in CELLS:
        mine = [e for e in errors if (e.case.cell, e.case.dtype) == (cell, dtype)]
        row = [f"{mean_ratio(e for e in mine if e.array in arrays):.2f}"
               for arrays in GROUPS.values()]  # fmt: skip
        rows.append([cell, *row])
    return Table(["cell", *GROUPS], rows, 1)


def by_scale(errors: Sequence[Error], dtype: str) -> Table:
    """For each cell and scale of the weights, the mean over outputs and over gradients, and the
    mean error of fastrnn's outputs in units of the dtype's epsilon."""
    eps = torch.finfo(getattr(torch, dtype)).eps
    rows = []
    for cell in CELLS:
        for scale in SCALES:
            mine = [
                e for e in errors if (e.case.cell, e.case.dtype, e.scale) == (cell, dtype, scale)
            ]
            outputs = [e for e in mine if e.array == "output"]
            gradients = [e for e in mine if e.array.startswith("d_")]
            both = [e.ours for e in outputs], [e.torchs for e in outputs]
            shown = [
                *(geometric_mean(one) / eps for one in both),
                *(mean_ratio(outputs), mean_ratio(gradients)),
            ]
            rows.append([cell, f"{scale:g}", *(f"{value:.2f}" for value in shown)])
    columns = ["cell", "scale", "fastrnn's error", "torch's error", "outputs", "gradients"]
    return Table(columns, rows, 1)


def page(errors: Sequence[Error], dtypes: Sequence[str]) -> str:
    """The page of the documentation."""
    known = info()
    machine = f"{known['cpu']['model']} ({known['cpu']['isa']}), torch {torch.__version__}"
    sizes = "; ".join(",".join(map(str, size)) for size in SIZES)
    method = (
        "fastrnn and torch.nn compute the same cases in the same dtype; torch.nn in float64 is the "
        "yardstick. An array's error is the root mean square of its difference from float64, "
        "relative to that of its values. The tables show fastrnn's error divided by torch's, as "
        "geometric means: below 1, fastrnn is more accurate."
    )
    measured = (
        f"Cases: RNN, GRU and LSTM with `T,B,I,H` of {sizes}, each with weights U(±1/√H) times "
        f"{', '.join(f'{scale:g}' for scale in SCALES)}. Outputs are those of inference, gradients "
        f"those of training. Measured on {machine}."
    )
    units = "By the scale of the weights; the outputs' errors are in units of float32's epsilon:"
    written = "Written by `python benchmarks/accuracy.py --write`."
    parts = ["# Accuracy", written, method, measured]
    for dtype in dtypes:
        parts += [f"## {dtype}", by_array(errors, dtype).markdown()]
        if dtype == "float32":
            parts += [units, by_scale(errors, dtype).markdown()]
    return "\n\n".join([*parts, CAUSES]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default=",".join(DTYPES), help="names, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    dtypes = options.dtype.split(",")
    if unknown := set(dtypes) - set(DTYPES):
        parser.error(f"--dtype {', '.join(unknown)}: expected some of {', '.join(DTYPES)}")
    if options.write and dtypes != list(DTYPES):
        parser.error("--write needs every dtype: leave out --dtype")
    torch.set_num_threads(1)  # the cases are small
    errors = []
    for dtype in dtypes:
        for cell in CELLS:
            print(f"{cell} {dtype}", file=sys.stderr, flush=True)
            for size in SIZES:
                case = Case(cell, *size, dtype=dtype)
                errors += [e for scale in SCALES for e in measure(case, scale)]
    print(f"fastrnn {fastrnn.__version__}: its error / torch's, geometric means")
    for dtype in dtypes:
        print(f"\n{dtype}\n{by_array(errors, dtype).text()}\n\n{by_scale(errors, dtype).text()}")
    if options.write:
        PAGE.write_text(page(errors, dtypes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
