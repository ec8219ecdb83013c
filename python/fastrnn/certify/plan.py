"""The classes, the cases that each class needs, and their order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastrnn._certificate import KERNELS
from fastrnn.bench.cases import CELLS, PASSES, Case

if TYPE_CHECKING:
    from fastrnn.bench.cases import Pass

Range = tuple[int, int]
RESETS = 0.05  # the share of steps at which an episode begins, for the case with resets


@dataclass(frozen=True)
class Trial:
    """One case, one pass, one kind of kernels: the unit that is run and compared."""

    case: Case  # with the longest T
    pass_: Pass
    kernels: str  # of KERNELS

    def label(self) -> str:
        return f"{self.case.label()} {self.pass_} {self.kernels}"


@dataclass(frozen=True)
class Class:
    """The calls that are trusted or rejected together; ranges include their bounds."""

    cell: str
    dtype: str  # of PRECISIONS
    layers: int  # of its cases; with both directions they represent any number
    bidirectional: bool
    hidden: Range
    rows: Range
    pass_: Pass
    kernels: str

    def label(self) -> str:
        stack = "both directions" if self.bidirectional else "one layer"
        sizes = f"H {self.hidden[0]}–{self.hidden[1]} B {self.rows[0]}–{self.rows[1]}"
        return f"{self.cell} {self.dtype} {stack} {self.pass_} {sizes}"

    def as_record(self) -> dict[str, Any]:
        """The class as a record of the certificate."""
        return {
            "cell": self.cell,
            "dtype": self.dtype,
            "layers": self.layers,
            "bidirectional": self.bidirectional,
            "pass": self.pass_,
            "kernels": self.kernels,
            "hidden": list(self.hidden),
            "rows": list(self.rows),
        }


@dataclass(frozen=True)
class Grid:
    """The classes of a run, each list with the most useful entries first, and the limits."""

    stacks: tuple[tuple[int, bool], ...] = ((1, False), (2, True))  # layers, both directions
    dtypes: tuple[str, ...] = ("tf32", "bfloat16", "float16", "float32")
    cells: tuple[str, ...] = CELLS
    hidden: tuple[Range, ...] = ((128, 512), (32, 128), (512, 1024))
    rows: tuple[Range, ...] = ((1, 16), (16, 128))
    passes: tuple[Pass, ...] = PASSES
    kernels: tuple[str, ...] = KERNELS[::-1]
    steps: int = 100  # the long T of every case; the short one is 1
    measured_seconds: float = 0.04  # for each T, fastrnn and torch together
    seconds: float = 600  # of the whole run


WHOLE = Grid()
QUICK = Grid(
    stacks=((1, False),),
    dtypes=("tf32", "bfloat16", "float16"),
    cells=("LSTM", "GRU"),
    hidden=((128, 512),),
    seconds=120,
)


def plan(grid: Grid) -> dict[Class, list[Trial]]:
    """The classes in the order of their tests, each with its cases.

    Classes share cases: common corners of adjacent ranges, and the cases with lengths and resets.

    >>> classes = plan(QUICK)
    >>> first = next(iter(classes))
    >>> first.label()
    'LSTM tf32 one layer inference H 128–512 B 1–16'
    >>> [trial.case.label() for trial in classes[first]][4:]
    ['LSTM T100 B5 I257 H257 tf32', 'LSTM T100 B5 I257 H257 lengths tf32', \
'LSTM T100 B5 I257 H257 reset0.05 tf32']
    """
    classes = itertools.product(
        grid.stacks, grid.dtypes, grid.cells, grid.hidden, grid.rows, grid.passes, grid.kernels
    )
    return {
        found: _trials(found, grid)
        for (layers, both), dtype, cell, hidden, rows, pass_, kernels in classes
        for found in [Class(cell, dtype, layers, both, hidden, rows, pass_, kernels)]
    }


def _trials(of: Class, grid: Grid) -> list[Trial]:
    def case(hidden: int, rows: int, **more: Any) -> Case:
        made = Case(of.cell, grid.steps, rows, hidden, hidden, of.layers, of.bidirectional)
        return replace(made, **more).in_precision(of.dtype)

    relu = {"nonlinearity": "relu"} if of.cell == "RNN" else {}
    everywhere = _odd_middle(grid.hidden[0]), _odd_middle(grid.rows[0])
    cases = [case(h, b) for h, b in itertools.product(of.hidden, of.rows)]
    cases += [
        case(_odd_middle(of.hidden), _odd_middle(of.rows), **relu),
        case(*everywhere, lengths=True),
        case(*everywhere, reset_rate=RESETS),
    ]
    return [Trial(case, of.pass_, of.kernels) for case in cases]


def _odd_middle(bounds: Range) -> int:
    """An odd size near the geometric mean of the bounds."""
    return math.isqrt(bounds[0] * bounds[1]) | 1
